"""The folder of a run: room, speed, and the clock of its file system."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil

from checkups.findings import Finding

GB = 1e9
BLOCK = 16 * 2**20
SLOW = 0.1  # GB/s
SKEW_S = 1.0


def run_folder(folder: Path) -> list[Finding]:
    """Free space, speed and clock of `folder`, or of the nearest parent that exists."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        speed, offset = write_speed(existing)
        usage = shutil.disk_usage(existing)
    except OSError as error:
        text, remedy = f"{existing}: {error.strerror}", "choose another run.dir, or mount it writable"
        return [Finding(section="run.dir", name="writable", text=text, remedy=remedy, failed=True)]
    remedy = "" if speed >= SLOW else "a checkpoint has 14 bytes a parameter; set run.dir to a faster disk"
    text = f"{speed:.2f} GB/s, flushed"
    kind = (
        f"{usage.free / GB:,.1f} of {usage.total / GB:,.1f} GB free in {existing} ({_file_system(existing)})"
    )
    found = [
        Finding(section="run.dir", name="room", text=kind),
        Finding(section="run.dir", name="write speed", text=text, remedy=remedy, value={"gb_per_s": speed}),
    ]
    wrong = abs(offset) > SKEW_S
    remedy = "synchronise the clocks of this host and of the file server (chrony)" if wrong else ""
    text = f"{offset:+.2f} s against this host"
    return [*found, Finding(section="run.dir", name="clock of the files", text=text, remedy=remedy)]


def write_speed(folder: Path, seconds: float = 1.0, most: int = 16 * BLOCK) -> tuple[float, float]:
    """GB/s of a new file, with its flush to the disk, and seconds by which its time is after ours. Writes for
    `seconds`, at most `most` bytes. OSError when it cannot be written.
    """
    block = os.urandom(BLOCK)  # nothing that a file system could compress
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        begin, size = time.perf_counter(), 0
        while size < most and time.perf_counter() - begin < seconds:
            size += file.write(block)
        file.flush()
        os.fsync(file.fileno())
        taken = time.perf_counter() - begin
        before = time.time()
        os.utime(file.fileno())  # now, by the clock of who keeps the file
        after = time.time()
        offset = os.fstat(file.fileno()).st_mtime - (before + after) / 2
    return size / taken / GB, offset


def _file_system(folder: Path) -> str:
    """What it is mounted as."""
    mounts = [m for m in psutil.disk_partitions(all=True) if folder.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else "unknown"
