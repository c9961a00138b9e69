"""What ranks do in the test of many pushes (support/ranks.py starts them): push, and look at what processes
hold.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from support.cases import PolicyRun
from support.jobs_grid import connected, disconnect, publisher_of
from support.jobs_policy import open_policy

OPTIONS = ("sync.chunk_bytes=200000", "sync.verify=1")


def push_many(model: str, url: str, token: str, server: int, num_pushes: int, folder: str) -> dict[str, Any]:
    """`num_pushes` pushes of the same weights from two tensor-parallel ranks into the server with process
    number `server`. From rank 0: what every process of the run holds, six times from half of the pushes on.
    """
    run = PolicyRun(name="flat", model=model, layout="tp2", overrides=OPTIONS)
    looks: list[dict[str, Any]] = []
    with open_policy(run, f"{folder}/store") as policy:
        publisher, shards = publisher_of(policy), policy.held_shards()
        targets = connected(url, token) if dist.get_rank() == 0 else None
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, os.getpid(), group=policy.session.control)
        looked_at = range(num_pushes // 2, num_pushes + 1, num_pushes // 10)
        for version in range(1, num_pushes + 1):
            publisher.publish(shards, version, targets)
            if targets and version in looked_at:
                looks.append({"version": version, **look(ranks, server)})
        if targets:
            disconnect(targets)
    return {"looks": looks}


def look(ranks: list[int], server: int) -> dict[str, Any]:
    """Of the ranks, and of the server with all of its processes together."""
    servers = [psutil.Process(server), *psutil.Process(server).children(recursive=True)]
    found = {f"rank {rank}": held(psutil.Process(pid)) for rank, pid in enumerate(ranks)}
    of_server = [held(process) for process in servers]
    found["server"] = {key: sum(one[key] for one in of_server) for key in of_server[0]}
    return found


def held(process: psutil.Process) -> dict[str, int]:
    """Resident memory in KiB, open files, shared segments that it has mapped, all mappings, threads."""
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    return {
        "resident": process.memory_info().rss // 1024,
        "open files": process.num_fds(),
        "shared segments": maps.count("memfd:") + maps.count("/dev/shm/"),
        "mappings": maps.count("\n"),
        "threads": process.num_threads(),
    }
