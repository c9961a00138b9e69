"""What ranks do in the tests of the exchange (support/ranks.py starts them)."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_dapo.errors import UserError
from megatron_dapo.layout import Layout
from megatron_dapo.sync import staging
from megatron_dapo.sync import staging_memory as memory_file
from megatron_dapo.sync.delta import Trial
from megatron_dapo.sync.plan import Worker, make_plan
from megatron_dapo.sync.sinks import SinkTable
from megatron_dapo.sync.sources import holdings
from support.exchanging import (
    MODELS,
    Case,
    Pushes,
    bytes_between_hosts,
    engines,
    make_exchange,
    on_all_ranks,
    plan_of,
    read_chunk,
    three_pushes,
    without_trial,
)
from support.planning import local_weights, make_workers
from support.weights import make_weights

DELTAS = Case(
    model="dense", layout=Layout(tp=2, pp=2), hosts="aabc", dtype="bfloat16", delta=True, changes=0.02
)


def run(cases: Mapping[str, Case]) -> dict[str, Any]:
    """Everything that the tests look at, in one start of the ranks; results of rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return {
        "cases": {name: three_pushes(case) for name, case in cases.items()},
        "left out": leave_an_engine_out(),
        "reads": reads_of_a_push(),
        "deltas": without_trial(deltas),
        "slow deltas": deltas_that_take_longer(),
        "memory": memory_of_a_push(),
        "workers": change_workers(),
        "errors": errors(),
    }


def leave_an_engine_out() -> dict[str, Any]:
    """The second of three pushes goes to all but one engine."""
    case, name = Case(model="dense", layout=Layout(tp=2, pp=2), hosts="aabb"), "tp2 on b"
    pushes, plan = Pushes(case), plan_of(case)
    pushes.push(1)
    chunks = [manifest for of_round in pushes.manifests[0] for manifest in of_round.get(name, ())]
    before = [read_chunk(manifest) for manifest in chunks]
    pushes.push(2, left_out=name)
    untouched = [read_chunk(manifest) for manifest in chunks] == before
    pushes.push(3)
    return {
        "wrong": pushes.wrong,
        "untouched": untouched,
        "sent": [sum(of_ranks) for of_ranks in zip(*on_all_ranks(pushes.sent), strict=True)],
        "planned": [bytes_between_hosts(plan), bytes_between_hosts(plan, left_out=name)],
    }


def deltas() -> dict[str, Any]:
    """Pushes of few changes: to all engines, to all but one in the second of three, and of which the second
    finds another image at the last worker's carrier than it was sent.
    """
    case, name = DELTAS, "tp2 on c"
    found: dict[str, Any] = {"plain": three_pushes(case)}
    pushes = Pushes(case)
    for version in (1, 2, 3):
        pushes.push(version, left_out=name if version == 2 else "", verify=version == 3)
    of_name = bytes_between_hosts(plan_of(case)) - bytes_between_hosts(plan_of(case), left_out=name)
    found["left out"] = {"wrong": pushes.wrong, "sent": sent_by_all(pushes), "whole to it": of_name}
    pushes.exchange.set_workers([])
    pushes = Pushes(case)
    pushes.push(1)
    dist.barrier()  # rank 0 has read everything
    if dist.get_rank() == 3:  # which carries for the last worker
        pushes.exchange._staging._own.bytes.bitwise_xor_(1)  # type: ignore[union-attr]
    dist.barrier()
    lost = pushes.push(2)
    found["damaged"] = {
        "lost": on_all_ranks(lost),
        "again": pushes.push(3),
        "wrong": pushes.wrong,
        "sent": sent_by_all(pushes),
    }
    pushes.exchange.set_workers([])
    return found


def deltas_that_take_longer() -> dict[str, Any]:
    """Four pushes of few changes, of which the third, by deltas, takes longer than the second."""
    pushes, seconds, loses, memory = Pushes(DELTAS), iter([9.0, 1.0, 2.0, 1.0]), Trial.loses, []
    late = mock.patch.object(Trial, "loses", lambda trial, engines, _: loses(trial, engines, next(seconds)))
    with late:
        for version in (1, 2, 3, 4):
            pushes.push(version)
            memory.append(pushes.exchange.extra_bytes)
    pushes.exchange.set_workers([])
    return {"wrong": pushes.wrong, "sent": sent_by_all(pushes), "memory": on_all_ranks(memory)}


def reads_of_a_push() -> list[dict[str, int]]:
    """By rank: the parcels that it sends, in how many messages, and how often they are packed and summed."""
    case = Case(model="dense", layout=Layout(tp=2, pp=2), hosts="aabc")
    pushes, plan = Pushes(case), plan_of(case)
    mine = [message for message in plan.messages if message.source == dist.get_rank()]
    with (
        mock.patch.object(staging, "pack", wraps=staging.pack) as packs,
        mock.patch.object(staging, "checksum", wraps=staging.checksum) as sums,
    ):
        pushes.push(1, verify=True)
    pushes.exchange.set_workers([])
    parcels = len({id(message.parcel) for message in mine})
    return on_all_ranks(
        {
            "parcels": parcels,
            "messages": len(mine),
            "packed": packs.call_count,
            "summed": sums.call_count,
            "wrong": len(pushes.wrong),
        }
    )


def sent_by_all(pushes: Pushes) -> list[int]:
    """Bytes to other hosts, by push."""
    return [sum(of_ranks) for of_ranks in zip(*on_all_ranks(pushes.sent), strict=True)]


def memory_of_a_push() -> list[dict[str, int]]:
    """By rank, in bytes: the memory that the exchange says it takes, how much the resident memory grew at
    most, what a worker needs and a chunk. A first push loads all code.
    """
    case = Case(model="big", layout=Layout(tp=2, pp=2), hosts="aabb", chunk_bytes=1 << 18)
    model = MODELS[case.model]
    workers = make_workers(model, ["a", "b"], tp=2)
    local = local_weights(model, case.layout, dist.get_rank(), make_weights(model))

    def push() -> int:
        exchange = make_exchange(case)
        exchange.set_workers(workers)
        for _ in exchange.rounds(local, 1, engines={worker.engine for worker in workers}, verify=True):
            pass
        extra_bytes = exchange.extra_bytes
        exchange.set_workers([])  # which frees the memory
        return extra_bytes

    push()
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    found = {"extra": push(), "grown": resident("VmHWM") - before, "worker": workers[0].table.num_bytes}
    plan = make_plan(
        workers, holdings(model, case.layout), case.hosts, chunk_bytes=case.chunk_bytes, dtype=case.dtype
    )
    in_rounds = [
        sum(m.parcel.num_bytes for m in messages if m.source == dist.get_rank() and plan.goes_far(m))
        for messages in plan.rounds
    ]
    return on_all_ranks(found | {"chunk": case.chunk_bytes, "sent in a round": max(in_rounds)})


def resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", text)
    assert match
    return int(match.group(1)) * 1024


def change_workers() -> dict[str, Any]:
    """Engines that come and go, and the memory and open files that are left of them."""
    case = Case(model="tied", layout=Layout(tp=2, dp=2), hosts="abab")
    pushes = Pushes(case)
    again = [
        dataclasses.replace(worker, table=SinkTable.from_json(worker.table.to_json()))
        for worker in pushes.workers
    ]
    fewer = [worker for worker in pushes.workers if worker.engine != "tp1 on a"]
    make, made = os.memfd_create, []
    with mock.patch.object(os, "memfd_create", lambda name: made.append(name) or make(name)):
        pushes.exchange.set_workers(again)
        unchanged = not made
        pushes.workers = fewer
        pushes.exchange.set_workers(fewer)
        pushes.push(1)
        left = []
        for workers in (again, fewer) * 4:
            pushes.exchange.set_workers(workers)
            maps = Path("/proc/self/maps").read_text().count("memfd:")
            left.append([len(os.listdir("/proc/self/fd")), maps])
    pushes.push(2)
    return {"unchanged": all(on_all_ranks(unchanged)), "wrong": pushes.wrong, "left": on_all_ranks(left)}


def errors() -> dict[str, list[str]]:
    """What every rank raises. The last attempt shows that nothing is left of the others."""
    case = Case(model="dense", layout=Layout(dp=4), hosts="aabb")
    exchange, workers, rank = make_exchange(case), engines(case), dist.get_rank()

    def attempt(workers: Sequence[Worker]) -> str:
        try:
            exchange.set_workers(workers)
        except (UserError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
        return "done"

    found = {}
    cannot = mock.patch.object(memory_file.mmap, "mmap", side_effect=OSError)
    with cannot if rank == 3 else nullcontext():
        found["no memory"] = attempt(workers)
    found["not the same"] = attempt(workers[:: -1 if rank == 2 else 1])
    found["at last"] = attempt(workers)
    return {name: on_all_ranks(text) for name, text in found.items()}
