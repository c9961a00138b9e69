"""One conversion writes into a folder at a time: a lock (flock) that the kernel gives back when its process
dies. The ranks of one torchrun launch share it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from pathlib import Path

from megatron_dapo.errors import UserError


def take(file: Path, launch: str | None) -> int:
    """Lock the file until this process ends or closes the descriptor that is returned.

    launch: what the ranks of one launch have in common; None for a process alone. UserError when another
    launch holds the lock.
    """
    mine = (launch or secrets.token_hex(8)).encode()
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    for _ in range(100):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, mine, 0)
        except BlockingIOError:
            pass
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody is writing its name at this moment
            time.sleep(0.1)
            continue
        if os.pread(descriptor, 200, 0) == mine:
            return descriptor
        break
    os.close(descriptor)
    raise UserError(
        f"another conversion is writing to {file.parent.parent}; wait until it has ended or choose "
        "another --out"
    )
