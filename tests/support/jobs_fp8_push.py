"""Ranks that push a policy's bf16 weights into engines in block FP8: workers that serve nothing, and a server
(support/ranks.py starts them).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_dapo.config import RunConfig
from megatron_dapo.model_spec import read_model
from megatron_dapo.sync.publish import PublishReport, make_publisher
from megatron_dapo.sync.sinks import SinkTable
from support.planning import local_shards
from support.targets import HOST, ReceiverEngine, Targets

OPTIONS = (
    "model.dtype=bf16",
    "rollout.quantization=fp8_block",
    "sync.chunk_bytes=200000",  # several rounds, and messages of less than a block
    "sync.verify=1",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Checkpoints of a model: what engines begin with, what the policy has, and that in block FP8."""

    begin: str
    policy: str
    quantised: str


class Engine(ReceiverEngine):
    """Counts bytes: of the workers' shards, and of what they were sent."""

    shard_bytes = sent_bytes = 0

    async def sink_tables(self, shapes: Mapping[str, Sequence[int]], dtype: str) -> list[Any]:
        answers = await super().sink_tables(shapes, dtype)
        self.shard_bytes = sum(SinkTable.from_json(answer).num_bytes for answer in answers)
        self.sent_bytes = 0
        return answers

    async def update_weights(self, info: list[dict[str, Any]]) -> None:
        self.sent_bytes += sum(manifest["num_bytes"] for manifest in info)
        await super().update_weights(info)


@contextlib.contextmanager
def engines_of(sizes: Sequence[int], folder: Path) -> Iterator[dict[str, Engine]]:
    """By name, one of each tensor-parallel size; none on other ranks than the first."""
    engines = {f"tp{tp}": Engine(tp, folder) for tp in sizes if dist.get_rank() == 0}
    try:
        for engine in engines.values():
            engine.on_all("use_fp8_kernels")
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


def push(cases: Mapping[str, Case], engine_sizes: Sequence[int], folder: str) -> dict[str, Any]:
    """By case and engine: bytes, and of every worker what `held_and_fresh` says. Results of rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with engines_of(engine_sizes, Path(folder)) as engines:
        return {name: push_one(case, engines) for name, case in cases.items()}


def push_to_server(policy: str, url: str, token: str) -> list[str]:
    """Of one rank. What it committed to."""
    from megatron_dapo.rollout.client import EngineClient

    dist.init_process_group("gloo")
    targets = Targets({})

    async def connect() -> EngineClient:
        client = EngineClient(url, token)
        await client.warm_up(300)  # with the weights that it has
        await client.init_weight_transfer()
        return client

    client = targets.run(connect())
    targets.clients = {"engine": client}
    report = publish(Path(policy), targets)
    targets.run(client.close())
    targets.close()
    return list(report.committed)


def push_one(case: Case, engines: Mapping[str, Engine]) -> dict[str, Any]:
    for engine in engines.values():
        engine.on_all("open", Path(case.begin))
    targets = Targets(engines) if dist.get_rank() == 0 else None
    publish(Path(case.policy), targets)
    if targets:
        targets.close()
    return {
        name: {
            "shard_bytes": engine.shard_bytes,
            "sent_bytes": engine.sent_bytes,
            "workers": engine.on_all("held_and_fresh", Path(case.quantised), 1),
        }
        for name, engine in engines.items()
    }


def publish(policy: Path, targets: Targets | None) -> PublishReport:
    """The checkpoint `policy`, in bf16, from all ranks, which are tensor-parallel."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = RunConfig.load(None, [f"model.path={policy}", f"layout.tensor_parallel={world}", *OPTIONS])
    spec, tensors = read_model(policy), load_file(policy / "model.safetensors")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    publisher = make_publisher(config, spec, rank, [HOST] * world, dist.group.WORLD)
    return publisher.publish(local_shards(spec, config.layout.to_layout(), rank, weights), 1, targets)
