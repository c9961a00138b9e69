"""What ranks do in the tests of hosts without ranks (support/ranks.py starts them): the pushes of
jobs_exchange.py, with carriers in processes of their own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.layout import Layout
from megatron_dapo.rendezvous import without_prefix
from support.carriers import Carriers
from support.exchanging import Case, Pushes, on_all_ranks, three_pushes, without_trial

TIMEOUT_S = 3.0
FAULTY = Case(model="dense", layout=Layout(tp=2, pp=2), hosts="aabb", engine_hosts="axy", timeout_s=TIMEOUT_S)


def run(cases: Mapping[str, Case], faults: Sequence[str]) -> dict[str, Any]:
    """Everything that the tests look at, in one start of the ranks; results of rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    store = without_prefix(dist.distributed_c10d._get_default_store())
    carriers = Carriers(store) if dist.get_rank() == 0 else None
    try:
        apart = {host for case in cases.values() for host in set(case.engine_hosts) - set(case.hosts)}
        for host in sorted(apart | {"x", "y"}) if carriers else ():
            carriers.start(host)  # type: ignore[union-attr]
        dist.barrier()
        return {
            "cases": {name: without_trial(partial(three_pushes, case)) for name, case in cases.items()},
            "few": few_members(),
            "faults": lose_and_find_again(faults, carriers),
            "files": open_files(),
        }
    finally:
        if carriers:
            carriers.close()


def few_members() -> list[int]:
    """How many connections each rank has, where one rank sends nothing to the host."""
    case = Case(model="dense", layout=Layout(dp=4), hosts="aabb", engine_hosts="x", chunk_bytes=1 << 20)
    pushes = Pushes(case)
    pushes.push(1)
    assert not pushes.wrong, pushes.wrong
    number = len(pushes.exchange._staging._links._connections)  # type: ignore[union-attr]
    pushes.exchange.set_workers([])
    return on_all_ranks(number)


def lose_and_find_again(faults: Sequence[str], carriers: Carriers | None) -> dict[str, Any]:
    """A push in which host y fails, and one after that with a carrier that works, for each fault."""
    pushes, found = Pushes(FAULTY), {}
    for fault in faults:
        if carriers:
            carriers.kill("y")
            carriers.start("y", fault)
        before = len(pushes.wrong)
        dist.barrier()
        pushes.exchange.set_workers([])  # as when the plan changes: new connections
        pushes.exchange.set_workers(pushes.workers)
        began = time.monotonic()
        lost = pushes.push(1, verify=True)
        seconds = time.monotonic() - began
        if carriers:
            carriers.kill("y")
            carriers.start("y")
        dist.barrier()
        again = pushes.push(2)  # nobody is told to make a new plan
        found[fault] = {
            "lost": on_all_ranks(sorted(lost)),
            "reasons": sorted(set(lost.values())),
            "seconds": seconds,
            "again": again,
            "wrong": pushes.wrong[before:],
        }
    pushes.exchange.set_workers([])
    return found


def open_files() -> list[list[int]]:
    """By rank: open files after each of four plans with a link, when they are closed."""
    pushes, counts = Pushes(FAULTY), []
    for _ in range(4):
        pushes.exchange.set_workers(pushes.workers)
        pushes.push(1)
        pushes.exchange.set_workers([])
        dist.barrier()
        counts.append(len(os.listdir("/proc/self/fd")))
    return on_all_ranks(counts)
