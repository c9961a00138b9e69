"""The ranks of a torchrun together: clocks, folders, versions, through its store, which works where gloo and
NCCL do not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from checkups.findings import Finding

SECTION = "between hosts"
TIMEOUT = timedelta(seconds=300)  # of torch's first import from a network file system
EXCHANGES = 8  # of which the fastest tells the offset
SKEW_S = 0.5
VISIBLE_S = 5.0  # a network file system may show a new file late


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """The ranks of a torchrun, as one sees them. The first rank of a host speaks for it; rank 0 asks."""

    rank: int
    world: int
    ranks_per_host: int
    store: Any  # torch.distributed.Store

    @classmethod
    def of_torchrun(cls) -> Meeting:
        """DistError when its store cannot be reached."""
        import torch.distributed as dist

        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        width = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return cls(rank=rank, world=world, ranks_per_host=width, store=dist.PrefixStore("doctor", store))

    @property
    def local_rank(self) -> int:
        return self.rank % self.ranks_per_host

    @property
    def speaks(self) -> bool:
        return self.local_rank == 0

    def speakers(self) -> list[int]:
        """The first rank of each host."""
        return list(range(0, self.world, self.ranks_per_host))

    def give(self, name: str, value: Any) -> None:
        self.store.set(f"{name}/{self.rank}", json.dumps(value))

    def take(self, name: str, rank: int) -> Any:
        """What a rank has given, as soon as it has. DistError when that takes too long."""
        return json.loads(self.store.get(f"{name}/{rank}"))

    def leave(self) -> None:
        """Rank 0 leaves last: it may be the one that keeps the store."""
        self.store.add("left", 1)
        deadline = time.monotonic() + TIMEOUT.total_seconds()
        while self.rank == 0 and self.store.add("left", 0) < self.world and time.monotonic() < deadline:
            time.sleep(0.02)


def clock(meeting: Meeting) -> list[Finding]:
    """On the first rank of each host but rank 0's: how far its clock is from rank 0's."""
    if meeting.rank == 0:
        for rank in meeting.speakers()[1:]:
            for number in range(EXCHANGES):
                meeting.take(f"ask {number}", rank)
                meeting.give(f"answer {number} of {rank}", time.time())
        return []
    times = []
    for number in range(EXCHANGES):
        asked = time.time()
        meeting.give(f"ask {number}", "")
        answered = meeting.take(f"answer {number} of {meeting.rank}", 0)
        times.append((asked, answered, time.time()))
    ahead, error = clock_offset(times)
    wrong = abs(ahead) - error > SKEW_S
    return [
        Finding(
            section=SECTION,
            name="clock",
            text=f"{ahead * 1e3:+.1f} ms against rank 0, give or take {error * 1e3:.1f} ms",
            remedy="synchronise the clocks of all hosts (chrony, NTP)" if wrong else "",
            value={"ahead_seconds": ahead, "error_seconds": error},
        )
    ]


def clock_offset(times: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """From exchanges (asked by our clock, answered by theirs, received by ours): seconds by which ours is
    ahead, and the largest error of that. The fastest exchange bounds it best (RFC 5905, section 8).
    """
    asked, answered, received = min(times, key=lambda exchange: exchange[2] - exchange[0])
    return (asked + received) / 2 - answered, (received - asked) / 2


def shared_folder(meeting: Meeting, folder: Path) -> list[Finding]:
    """On the first rank of each host but rank 0's: whether it sees a new file of rank 0 in `folder`."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if meeting.rank == 0:
        probe = existing / f".doctor-{os.getpid()}-{time.time_ns()}"
        try:
            probe.touch()
            meeting.give("probe", str(probe))
            for rank in meeting.speakers()[1:]:
                meeting.take("seen", rank)
        except OSError:  # of which the folder's own finding tells
            meeting.give("probe", "")
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
        return []
    if not (probe := meeting.take("probe", 0)):
        return []
    deadline = time.monotonic() + VISIBLE_S
    while not (seen := Path(probe).exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    meeting.give("seen", seen)
    folder_of_0 = Path(probe).parent
    return [
        Finding(
            section=SECTION,
            name="run.dir",
            text=f"{folder_of_0} is {'shared with' if seen else 'not the folder of'} rank 0's host",
            remedy="" if seen else "run.dir must be on a file system that all hosts share",
            failed=not seen,
        )
    ]


def collect(meeting: Meeting, own: Sequence[Finding], host: str) -> dict[str, list[Finding]]:
    """On rank 0: the findings of all hosts by name, in the order of their ranks; elsewhere nothing."""
    import torch.distributed as dist

    if meeting.rank:
        meeting.give("findings", [host, [asdict(finding) for finding in own]])
        return {}
    by_host = {host: list(own)}
    for rank in meeting.speakers()[1:]:
        try:
            name, findings = meeting.take("findings", rank)
        except dist.DistError:
            text, remedy = f"rank {rank} has not answered", "look at what that rank printed on its host"
            lost = Finding(section=SECTION, name="findings", text=text, remedy=remedy, failed=True)
            name, findings = f"host of rank {rank}", [asdict(lost)]
        if name in by_host:
            name = f"{name} (rank {rank})"
        by_host[name] = [Finding(**finding) for finding in findings]
    return by_host


def same_software(by_host: Mapping[str, Sequence[Finding]], section: str) -> Finding:
    """Whether all hosts have the same versions."""
    texts: dict[str, dict[str, list[str]]] = {}
    for host, findings in by_host.items():
        for f in findings:
            if f.section == section:
                texts.setdefault(f.name, {}).setdefault(f.text, []).append(host)
    differing = [
        f"{name}: " + "; ".join(f"{text} on {', '.join(hosts)}" for text, hosts in by_text.items())
        for name, by_text in texts.items()
        if len(by_text) > 1
    ]
    remedy = "start the same image, or the same environment, on all hosts" if differing else ""
    text = "\n".join(differing) or "the same on all hosts"
    return Finding(section=SECTION, name="software", text=text, remedy=remedy)
