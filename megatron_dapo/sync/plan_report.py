"""What a plan costs: bytes by link, by rank and by worker, and the seconds they take at given bandwidths.

Planned, not measured: links run at their full bandwidth in both directions, and messages have no latency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_dapo.sync.plan import Carrier, Message, Plan

LINKS = ("same_rank", "inside_host", "between_hosts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidths:
    """Bytes a second of one process, in one direction: a rank, or one that serves a host without ranks.
    same_rank: a copy in a rank's own memory.
    """

    same_rank: float
    inside_host: float
    between_hosts: float


# Data sheets of H100 SXM5 and DGX H100. Memory 3.35 TB/s, of which a copy reads and writes half each. NVLink
# 900 GB/s, both directions together. Eight adapters of 400 Gb/s a node, one for each GPU.
H100 = Bandwidths(same_rank=3.35e12 / 2, inside_host=900e9 / 2, between_hosts=400e9 / 8)


def report(plan: Plan, bandwidths: Bandwidths) -> dict[str, Any]:
    """Counts, bytes and seconds of one push, for JSON.

    shard_by_worker: what the worker needs at least. ratio_bytes: the most that a worker receives, over that;
    1 unless its model's loaders compute with some tensors (SinkTable.whole), which come whole.
    """
    by_link, sent, received = Counter[str](), Counter[int](), Counter[int]()
    for message in plan.messages:
        by_link[link(plan, message)] += message.parcel.num_bytes
        sent[message.source] += message.parcel.num_bytes
        received[message.worker] += message.parcel.num_bytes
    shards = [worker.table.num_bytes for worker in plan.workers]
    return {
        "hosts": len({*plan.rank_hosts, *(worker.host for worker in plan.workers)}),
        "ranks": len(plan.rank_hosts),
        "engines": len({worker.engine for worker in plan.workers}),
        "workers": len(plan.workers),
        "rounds": len(plan.rounds),
        "messages": sum(map(len, plan.rounds)),
        "bytes": {name: by_link[name] for name in LINKS} | {"total": by_link.total()},
        "sent_by_rank": _spread([sent[rank] for rank in range(len(plan.rank_hosts))]),
        "received_by_worker": _spread([received[number] for number in range(len(plan.workers))]),
        "shard_by_worker": _spread(shards),
        "ratio_bytes": max(received[number] / max(size, 1) for number, size in enumerate(shards)),
        "bandwidths": asdict(bandwidths),
        "seconds": seconds(plan, bandwidths),
        "digest": plan.digest,
    }


def link(plan: Plan, message: Message) -> str:
    """What the message travels over; one of LINKS."""
    if message.source == plan.carriers[message.worker]:
        return "same_rank"
    return "between_hosts" if plan.goes_far(message) else "inside_host"


def seconds(plan: Plan, bandwidths: Bandwidths) -> dict[str, float]:
    """By link: the sum over the rounds of what the busiest rank or carrier takes, sending and receiving at
    once.

    exchange: with all links at work at once. push: a chunk is exchanged while the one before is copied into
    the engine's parameters, at the bandwidth of `same_rank`.
    """
    per_link = asdict(bandwidths)
    totals = dict.fromkeys(LINKS, 0.0)
    exchanges, loads = [], []
    for messages in plan.rounds:
        busiest = _busiest(plan, messages)
        times = {name: busiest[name] / per_link[name] for name in LINKS}
        for name in LINKS:
            totals[name] += times[name]
        exchanges.append(max(times.values()))
        chunks = Counter[int]()
        for message in messages:
            chunks[message.worker] += message.parcel.num_bytes
        loads.append(max(chunks.values()) / bandwidths.same_rank)
    overlapped = sum(map(max, zip([*exchanges, 0.0], [0.0, *loads], strict=True)))
    return totals | {"exchange": sum(exchanges), "push": overlapped}


def _busiest(plan: Plan, messages: Sequence[Message]) -> dict[str, int]:
    """By link, the bytes that the rank or carrier with most of them sends or receives. A copy in a rank's own
    memory counts once.
    """
    ends: dict[str, Counter[tuple[str, Carrier]]] = {name: Counter() for name in LINKS}
    for message in messages:
        name, carrier = link(plan, message), plan.carriers[message.worker]
        ends[name]["out", message.source] += message.parcel.num_bytes
        ends[name]["in", carrier] += message.parcel.num_bytes
    return {name: max(counted.values(), default=0) for name, counted in ends.items()}


def _spread(values: Sequence[int]) -> dict[str, Any]:
    """min, mean, max, max over mean, and all of them in their order."""
    mean = sum(values) / len(values)
    return {
        "min": min(values),
        "mean": mean,
        "max": max(values),
        "max_over_mean": max(values) / mean if mean else 1.0,
        "each": list(values),
    }
