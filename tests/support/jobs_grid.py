"""What ranks do in the tests of whole weight pushes (support/ranks.py starts them): a real policy in one
layout after another is updated, pushed and exported, and rank 0 compares what the engines hold.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dapo.sync.publish import Publisher, make_publisher
from support.cases import PolicyRun, plan
from support.jobs_policy import export, open_policy, part_of
from support.samples import make_samples
from support.targets import HOST, ReceiverEngine, Targets, receiver_engines

NUM_UPDATES = 5
OPTIONS = ("optimizer.lr=0.003", "sync.chunk_bytes=50000", "sync.verify=1")
Held = Callable[[Path, int], dict[str, tuple[dict[str, str], dict[str, str], list[str]]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint, and the layouts of the policies that are trained from it."""

    model: str
    layouts: Sequence[str]


def push_to_receivers(cases: Mapping[str, Case], engine_sizes: Sequence[int], folder: str) -> dict[str, Any]:
    """NUM_UPDATES pushes of every layout of every case into engines of these tensor-parallel sizes that serve
    nothing. By case, layout and worker: what `compare` says.
    """
    here, found = Path(folder), {}
    with on_rank_0(lambda: receiver_engines(here / "digests", engine_sizes)) as engines:
        for name, case in cases.items():
            targets = None
            if engines is not None:
                for engine in engines.values():
                    engine.on_all("open", Path(case.model))
                targets = Targets(engines)
            found[name] = pushes(case, here / name, targets, lambda to, v: held_by(engines or {}, to, v))
            if targets:
                targets.close()
    return found


def held_by(engines: Mapping[str, ReceiverEngine], exported: Path, version: int) -> dict[str, Any]:
    """By worker: digests of what it holds, of what a fresh one loads, and what it computes differently."""
    found = {}
    for name, engine in engines.items():
        for rank, answer in enumerate(engine.on_all("held_and_fresh", exported, version)):
            found[f"{name} rank {rank}"] = answer
    return found


def push_to_server(case: Case, tp: int, url: str, token: str, digests: str, folder: str) -> dict[str, Any]:
    """The same into a running server of `tp` workers that writes `digests`; what a fresh one would hold is
    loaded without a server. The export of the last push is left in `folder`/export.
    """
    here = Path(folder)

    def held(exported: Path, version: int) -> dict[str, Any]:
        found = {}
        for rank, fresh in enumerate(loaders[f"tp{tp}"].on_all("fresh_digests", exported)):
            pushed = json.loads((Path(digests) / f"tp{rank}-v{version}.json").read_text())
            found[f"rank {rank}"] = pushed, fresh, []
        return found

    with on_rank_0(lambda: receiver_engines(here / "loaders", [tp])) as loaders:
        targets = None
        if loaders is not None:
            loaders[f"tp{tp}"].on_all("open", Path(case.model))
            targets = connected(url, token)
        found = pushes(case, here, targets, held)
        if targets:
            disconnect(targets)
    return found


def pushes(case: Case, folder: Path, targets: Targets | None, held: Held) -> dict[str, Any]:
    """By layout and worker: `compare` after every push. Versions count on over the layouts."""
    found: dict[str, Any] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, layout in enumerate(case.layouts):
        run = PolicyRun(name=layout, model=case.model, layout=layout, overrides=OPTIONS)
        with open_policy(run, f"{folder}/{layout}.store") as policy:
            if policy is None:
                continue
            publisher = publisher_of(policy)
            samples = make_samples()
            batch = part_of(
                policy,
                plan(
                    samples,
                    policy.session.layout,
                    num_updates=1,
                    budget="half",
                    denominator=policy.objective.denominator,
                ),
            )
            batch = policy.streams(batch)
            before: dict[str, dict[str, str]] = {}
            for version in range(NUM_UPDATES * number + 1, NUM_UPDATES * (number + 1) + 1):
                policy.update(batch, 0)
                publisher.publish(policy.held_shards(), version, targets)
                export(policy, folder / "export")
                if targets is None:
                    continue
                for worker, answer in held(folder / "export", version).items():
                    result = compare(*answer, before.get(worker, {}))
                    found.setdefault(layout, {}).setdefault(worker, []).append(result)
                    before[worker] = answer[0]
    return found


def compare(
    pushed: Mapping[str, str], fresh: Mapping[str, str], computed: Sequence[str], before: Mapping[str, str]
) -> dict[str, Any]:
    """How many parameters there are; the names of those that are not as a fresh engine loads them, or compute
    otherwise; and of those that did not change since the push before.
    """
    names = pushed.keys() | fresh.keys()
    return {
        "parameters": len(fresh),
        "wrong": sorted(name for name in names if pushed.get(name) != fresh.get(name)),
        "computed": list(computed),
        "unchanged": sorted(name for name in pushed if pushed[name] == before.get(name)),
    }


def publisher_of(policy: Any) -> Publisher:
    session = policy.session
    hosts = [HOST] * session.world_size
    return make_publisher(policy.config, policy.spec, session.rank, hosts, session.control)


@contextmanager
def on_rank_0(make: Callable[[], Any]) -> Iterator[Any]:
    """What the context manager gives, on rank 0; None elsewhere."""
    if os.environ["RANK"] != "0":
        yield None
        return
    with make() as made:
        yield made


def connected(url: str, token: str) -> Targets:
    """A server that is named `engine`."""
    from megatron_dapo.rollout.client import EngineClient

    targets = Targets({})

    async def connect() -> EngineClient:
        client = EngineClient(url, token)
        await client.init_weight_transfer()
        return client

    targets.clients = {"engine": targets.run(connect())}
    return targets


def disconnect(targets: Targets) -> None:
    client: Any = targets.clients["engine"]
    targets.run(client.close())
    targets.close()
