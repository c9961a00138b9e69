"""What links between ranks carry, by gloo and, with GPUs, by NCCL, while all ranks send and receive."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from checkups.findings import Finding
from checkups.ranks import Meeting

SECTION = "links"
TIMEOUT = timedelta(seconds=60)
GB = 1e9
FIRST, MOST = 2**20, 2**28  # bytes; doubled until a transfer takes LONG_S
LONG_S = 0.1
REPEATS = 3
UNEVEN = 0.5  # of the median
LEAST = {"gloo": 0.1, "nccl": 5.0}  # GB/s of a rank to another host
REMEDIES = {
    "gloo": "GLOO_SOCKET_IFNAME may name a slow interface; iperf3 between these hosts tells",
    "nccl": "NCCL may use sockets instead of InfiniBand; NCCL_DEBUG=INFO says what it chose (NCCL_IB_HCA, "
    "--device /dev/infiniband, locked memory)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Ranks joined by gloo or NCCL, and where the bytes lie that they exchange."""

    backend: str
    group: dist.ProcessGroup
    device: torch.device

    def largest(self, value: float) -> float:
        tensor = torch.tensor([value], dtype=torch.float32, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.item()

    def of_all(self, value: float) -> list[float]:
        own = torch.tensor([value], dtype=torch.float32, device=self.device)
        parts = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(parts, own, group=self.group)
        return [part.item() for part in parts]


def measure(meeting: Meeting) -> list[Finding]:
    """Called on every rank; rank 0 gets the findings."""
    own_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= meeting.ranks_per_host
    meeting.store.add("ranks with a GPU", int(own_gpu))
    found = _tried(meeting, "gloo", lambda: _by_gloo(meeting))
    works = meeting.take("gloo works", 0)
    if works and meeting.store.add("ranks with a GPU", 0) == meeting.world:
        found += _tried(meeting, "nccl", lambda: _by_nccl(meeting))
    if dist.is_initialized():
        dist.destroy_process_group()
    return found


def _by_gloo(meeting: Meeting) -> list[Finding]:
    store = dist.PrefixStore("gloo", meeting.store)
    dist.init_process_group("gloo", store=store, rank=meeting.rank, world_size=meeting.world, timeout=TIMEOUT)
    group = dist.distributed_c10d._get_default_group()
    return carry(Group(backend="gloo", group=group, device=torch.device("cpu")), meeting)


def _by_nccl(meeting: Meeting) -> list[Finding]:
    device = torch.device("cuda", meeting.local_rank)
    torch.cuda.set_device(device)
    group = dist.new_group(backend="nccl", timeout=TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return carry(Group(backend="nccl", group=group, device=device), meeting)


def _tried(meeting: Meeting, backend: str, test: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a test; when it fails on any rank, what that rank says. Rank 0 hears of all."""
    words, found = "", []
    try:
        found = test()
    except (RuntimeError, ValueError) as error:  # dist.DistError is one
        words = f"rank {meeting.rank}: {str(error).splitlines()[0]}"
    meeting.give(backend, words)
    if meeting.rank:
        return found
    failures = []
    for rank in range(meeting.world):
        try:
            failures += filter(None, [meeting.take(backend, rank)])
        except dist.DistError:
            failures.append(f"rank {rank} has not answered")
    meeting.give(f"{backend} works", not failures)
    if not failures:
        return found
    return [
        Finding(
            section=SECTION,
            name=backend,
            text="\n".join(failures),
            remedy="set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the hosts; a "
            "firewall must let free ports pass among them",
            failed=True,
        )
    ]


# --- measuring


def carry(group: Group, meeting: Meeting) -> list[Finding]:
    """Rates inside hosts, between hosts, and of an all-reduce."""
    found, world = [], meeting.world
    for place, targets in rings(world, meeting.ranks_per_host).items():
        target, source = targets[meeting.rank], targets.index(meeting.rank)
        rates = group.of_all(_rate(group, lambda size: _exchange(group, target, source, size)))  # noqa: B023
        found.append(verdict(group.backend, place, rates, targets))
    if world > 1:
        share = 2 * (world - 1) / world  # of the bytes, that each rank sends in a ring
        rate = share * _rate(group, lambda size: _all_reduce(group, size)) / GB
        text = f"{rate:.2f} GB/s a rank (bus bandwidth)"
        name, value = f"{group.backend}, all-reduce", {"gb_per_s": rate}
        found.append(Finding(section=SECTION, name=name, text=text, value=value))
    return found


def rings(world: int, ranks_per_host: int) -> dict[str, list[int]]:
    """To whom each rank sends: the next one on its host; the same one on the next host."""
    width, ranks = ranks_per_host, range(world)
    found = {}
    if width > 1:
        found["inside hosts"] = [rank - rank % width + (rank + 1) % width for rank in ranks]
    if world > width:
        found["between hosts"] = [(rank + width) % world for rank in ranks]
    return found


def verdict(backend: str, place: str, rates: Sequence[float], targets: Sequence[int]) -> Finding:
    """Of bytes a second by rank: an unevenly slow link is a warning, and one that is slow for its kind."""
    slowest = min(range(len(rates)), key=rates.__getitem__)
    low, middle, high = rates[slowest] / GB, statistics.median(rates) / GB, max(rates) / GB
    text = f"{low:.2f} to {high:.2f} GB/s a rank, slowest from rank {slowest} to {targets[slowest]}"
    remedy = ""
    if low < UNEVEN * middle:
        remedy = f"the median is {middle:.2f} GB/s; look at cable, card and load of these two ranks' hosts"
    elif place == "between hosts" and middle < LEAST[backend]:
        remedy = REMEDIES[backend]
    value = {"least_gb_per_s": low, "median_gb_per_s": middle, "most_gb_per_s": high, "slowest_rank": slowest}
    return Finding(section=SECTION, name=f"{backend}, {place}", text=text, remedy=remedy, value=value)


def _rate(group: Group, transfer: Callable[[int], None]) -> float:
    """Bytes a second of this rank: sizes double until a transfer takes long on some rank; of that size the
    fastest of a few counts.
    """

    def timed() -> float:
        group.largest(0.0)  # all begin together
        begin = time.perf_counter()
        transfer(size)
        return time.perf_counter() - begin

    size = FIRST
    timed()  # connects
    while group.largest(timed()) < LONG_S and size < MOST:
        size *= 2
    return size / min(timed() for _ in range(REPEATS))


def _exchange(group: Group, target: int, source: int, size: int) -> None:
    outgoing = torch.zeros(size, dtype=torch.uint8, device=group.device)
    incoming = torch.empty_like(outgoing)
    operations = [
        dist.P2POp(dist.isend, outgoing, target, group.group),
        dist.P2POp(dist.irecv, incoming, source, group.group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    _finish(group)


def _all_reduce(group: Group, size: int) -> None:
    dist.all_reduce(torch.zeros(size // 4, dtype=torch.float32, device=group.device), group=group.group)
    _finish(group)


def _finish(group: Group) -> None:
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)
