"""Real servers in tests."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from megatron_dapo.rollout.server import EngineServer


@contextmanager
def running(server: EngineServer, timeout_s: float = 300) -> Iterator[EngineServer]:
    """From healthy to stopped, whatever happens between."""
    server.start()
    try:
        asyncio.run(server.wait_healthy(timeout_s))
        yield server
    finally:
        server.stop()


def group_members(group: int) -> list[int]:
    """Processes of a process group that are not zombies."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return members


def wait_until_gone(group: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while members := group_members(group):
        assert time.monotonic() < deadline, (
            f"still running: {[psutil.Process(pid).cmdline() for pid in members]}"
        )
        time.sleep(0.1)
