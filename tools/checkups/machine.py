"""Cores, memory and limits of this host, as a process of a run has them."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import psutil

from checkups.findings import Finding
from checkups.network import infiniband, read

MIB, GIB = 2**20, 2**30
SHM_GIB = 1  # docker's default of 64 MiB is too little for NCCL and for vLLM's messages to its workers
OPEN_FILES = 65536  # rank 0 has one for each request in flight
PROCESSES = 4096


def cores_and_memory(root: Path = Path("/")) -> list[Finding]:
    """`root`: where proc and sys are, for tests."""
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    remedy = (
        "" if usable == there else "srun --cpu-bind=none with --cpus-per-task, or taskset, gives the rest"
    )
    memory = psutil.virtual_memory()
    text = f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} available"
    found = [
        Finding(section="machine", name="cores", text=f"{usable} of {there} usable", remedy=remedy),
        Finding(section="machine", name="memory", text=text),
    ]
    if (limit := cgroup_memory(root)) is not None and limit < memory.total:
        remedy = "docker run --memory, or Slurm's --mem=0, raises it" if limit < memory.total / 2 else ""
        text = f"{limit / GIB:.1f} GiB for this container or job"
        found.append(Finding(section="machine", name="memory limit", text=text, remedy=remedy))
    if (cores := cgroup_cores(root)) is not None and cores < usable:
        remedy = "docker run --cpus, or Slurm's --cpus-per-task, raises it"
        text = f"{cores:g} cores for this container or job"
        found.append(Finding(section="machine", name="core limit", text=text, remedy=remedy))
    return found


def cgroup_memory(root: Path) -> int | None:
    """Bytes that the control group allows (version 2, then 1), or None for no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = read(root / "sys/fs/cgroup" / name)
        if text is not None and text.isdecimal():
            return int(text)
    return None


def cgroup_cores(root: Path) -> float | None:
    """Cores' worth of time that the control group allows (version 2, then 1), or None for no limit."""
    if (text := read(root / "sys/fs/cgroup/cpu.max")) is not None:
        quota, period = text.split()
    else:
        quota = read(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us") or "-1"
        period = read(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us") or "100000"
    return int(quota) / int(period) if quota.isdecimal() else None


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Where processes of a host exchange tensors and messages."""
    remedy = "docker run --ipc=host, or --shm-size=16g"
    try:
        usage, writable = shutil.disk_usage(folder), os.access(folder, os.W_OK)
    except OSError as error:
        text = f"{folder}: {error.strerror}"
        return Finding(section="machine", name="shared memory", text=text, remedy=remedy, failed=True)
    text = f"{usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} free"
    if not writable:
        text, remedy = f"{text}, not writable", f"make {folder} writable (mode 1777)"
    elif usage.free >= SHM_GIB * GIB:
        remedy = ""
    return Finding(section="machine", name="shared memory", text=text, remedy=remedy, failed=not writable)


def limits() -> list[Finding]:
    """Limits of this process that a run meets."""
    files, processes = resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC
    found = [
        _limit("open files", files, OPEN_FILES, "ulimit -n, docker run --ulimit nofile=1048576:1048576"),
        _limit("processes", processes, PROCESSES, "ulimit -u, docker run --ulimit nproc=-1"),
    ]
    if infiniband():
        remedy = "ulimit -l unlimited, docker run --ulimit memlock=-1: InfiniBand registers memory"
        found.append(_limit("locked memory", resource.RLIMIT_MEMLOCK, 2**62, remedy))
    return found


def _limit(name: str, kind: int, needed: int, remedy: str) -> Finding:
    """A run raises soft limits by itself, so the hard one counts."""
    soft, hard = resource.getrlimit(kind)
    low = hard != resource.RLIM_INFINITY and hard < needed
    words = ["unlimited" if value == resource.RLIM_INFINITY else f"{value:,}" for value in (soft, hard)]
    text = f"{words[0]} (hard {words[1]})"
    return Finding(section="limits", name=name, text=text, remedy=remedy if low else "")
