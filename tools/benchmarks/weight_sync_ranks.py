"""Weight pushes from the ranks of a policy that is not there: each rank holds tensors of the sizes and places
that Megatron's would have.

python -m benchmarks.weight_sync_ranks CONFIG.yaml PUSHES BASELINE,... OUT.json     on each rank
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
import torch.distributed as dist

from benchmarks.weight_sync_engine import OneServer, started
from benchmarks.weight_sync_gather import gathering
from benchmarks.weight_sync_tables import shard_bytes
from megatron_dapo.config import RunConfig
from megatron_dapo.model_spec import ModelSpec, read_model
from megatron_dapo.sync.delta import Trial
from megatron_dapo.sync.export import export
from megatron_dapo.sync.publish import Publisher, Shapes, make_publisher
from megatron_dapo.sync.sources import Held, Holdings, holdings
from megatron_dapo.train import die_with_parent, prepare_device
from megatron_dapo.weights.hf import DTYPES
from megatron_dapo.weights.names import hf_shapes
from megatron_dapo.weights.slices import Shard, Slice

MEMCPY_BYTES = 1 << 30  # of a buffer, at most
FULL_GATHER, WHOLE, RELOAD = "full-gather", "shm-whole", "safetensors-reload"
DELTA = "delta"
CHANGED = 0.01  # of the elements, in a push of few changes


class Weights:
    """held: all that the rank has, for pushes. contributed: what it brings to an export, where every element
    comes from one rank.
    """

    def __init__(self, places: Holdings, shapes: Shapes, rank: int, dtype: torch.dtype) -> None:
        self._chance = torch.Generator().manual_seed(0)
        self.held: list[Shard] = []
        self.contributed: list[Shard] = []
        for name, parts in places.items():
            for part in parts:
                if rank in part.ranks:
                    shard = make_shard(name, shapes[name], part, dtype)
                    self.held.append(shard)
                    if rank == part.ranks[0]:
                        self.contributed.append(shard)

    def change(self, share: float = 1.0) -> None:
        """Every value becomes another one; or about this share of them, in their last bit."""
        for shard in self.held:
            if share == 1.0:
                shard.tensor.neg_()
            else:
                bits = shard.tensor.view(-1).view(torch.int16)
                bits[torch.randint(len(bits), (round(share * len(bits)),), generator=self._chance)] ^= 1


def make_shard(name: str, shape: tuple[int, ...], part: Held, dtype: torch.dtype) -> Shard:
    """The part as a parameter of its own, with values that are the same on all ranks that hold it."""
    seed = zlib.crc32(f"{name} {part.box.start}".encode())
    values = torch.empty(part.box.size, dtype=dtype)
    values.uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(seed))
    sides = zip(part.box.size, shape, strict=True)
    dim = next((d for d, (extent, whole) in enumerate(sides) if extent != whole), 0)
    return Shard(name, values, (Slice(name, dim, part.box.start[dim], 0, part.box.size[dim]),))


class Measurement:
    """Of pushes by whatever way. server: on rank 0."""

    def __init__(self, weights: Weights, server: OneServer | None, control: Any) -> None:
        self._weights, self.server, self.control = weights, server, control
        self.share = 1.0  # of the values that change between pushes

    def pushes(self, publisher: Publisher, count: int) -> list[dict[str, Any]]:
        """With new values each; {} on other ranks than 0. Collective, like everything here."""
        return [
            self._measure(lambda version=i: publisher.publish(self._weights.held, version, self.server))
            for i in range(count)
        ]

    def reloads(self, config: RunConfig, spec: ModelSpec, count: int) -> list[dict[str, Any]]:
        """Export to a folder on disk, from which the workers then load with vLLM's own loaders."""
        source = Path(config.model.path)
        folder = Path(config.run.dir) / "export"
        rank = dist.get_rank()
        if self.server:
            self.server.on_workers("update_config", overrides={"load_config": {"load_format": "safetensors"}})

        def push() -> None:
            export(self._weights.contributed, spec, config.model.dtype, rank, self.control, folder, source)
            if self.server:
                workers = self.server.on_workers("reload_weights", weights_path=str(folder))
                size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                self.server.client.received.update(dict.fromkeys(range(len(workers)), size))

        return [self._measure(push) for _ in range(count)]

    def _measure(self, push: Callable[[], Any]) -> dict[str, Any]:
        self._weights.change(self.share)
        if self.server:
            self.server.client.received.clear()
            self.server.on_workers("benchmark_begin")
        dist.barrier(group=self.control)
        began = time.perf_counter()
        push()
        seconds = time.perf_counter() - began
        if self.server is None:
            return {}
        received = self.server.client.received
        workers = self.server.on_workers("benchmark_end")
        return {
            "seconds": seconds,
            "received": [received[worker] for worker in range(len(workers))],
            "workers": workers,
        }


def main(file: str, num_pushes: str, baselines: str, out: str) -> None:
    """One rank."""
    die_with_parent(os.getppid())
    config = RunConfig.load(file, [])
    prepare_device(config)
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), Path(config.model.path)
    spec = read_model(folder)
    with started(config, folder) if rank == 0 else nullcontext() as server:
        places = holdings(spec, config.layout.to_layout())
        weights = Weights(places, hf_shapes(spec), rank, DTYPES[config.model.dtype])
        measurement = Measurement(weights, server, dist.group.WORLD)
        measured = measure_all(measurement, config, spec, int(num_pushes), baselines.split(","))
        if rank == 0:
            Path(out).write_text(json.dumps(measured))
    dist.destroy_process_group()


def measure_all(
    measurement: Measurement, config: RunConfig, spec: ModelSpec, count: int, baselines: Collection[str]
) -> dict[str, Any]:
    """`count` pushes of each way; on rank 0 what weight_sync.report takes."""
    server, control = measurement.server, measurement.control
    hosts = [socket.gethostname()] * dist.get_world_size()
    publisher = make_publisher(config, spec, dist.get_rank(), hosts, control)
    pushes = measurement.pushes(publisher, count)
    kept: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(kept, publisher._transport.extra_bytes, group=control)
    publisher._transport.set_workers([])  # gives its memory back
    measured = {"pushes": pushes, "peak_extra_bytes_sender": max(kept), "baselines": {}}
    if DELTA in baselines:
        measured["delta"] = measure_delta(measurement, config, spec, count)
    if server:
        measured["lower_bound_bytes"] = [shard_bytes(table) for table in server.client.tables]
        measured["memcpy_gbps"] = memcpy_gbps(sum(pushes[-1]["received"]))
        server.on_workers("benchmark_vllm_loads")
    for name in (FULL_GATHER, WHOLE):
        if name in baselines:
            publisher = make_publisher(config, spec, dist.get_rank(), hosts, control)
            if name == FULL_GATHER:
                places = holdings(spec, config.layout.to_layout())
                publisher = gathering(publisher, places, hf_shapes(spec))
            measured["baselines"][name] = measurement.pushes(publisher, count)
            publisher._transport.set_workers([])
    if RELOAD in baselines:
        measured["baselines"][RELOAD] = measurement.reloads(config, spec, count)
    return measured


def measure_delta(
    measurement: Measurement, config: RunConfig, spec: ModelSpec, count: int
) -> dict[str, dict[str, Any]]:
    """Pushes of few changes with and without sync.delta, where all ranks but the first are taken to be on
    another host than the server.
    """
    ranks = dist.get_world_size()
    hosts, found = [socket.gethostname(), *(["elsewhere"] * (ranks - 1))], {}
    measurement.share = CHANGED
    for delta in (False, True):
        sync = config.sync.model_copy(update={"delta": delta})
        changed = config.model_copy(update={"sync": sync})
        publisher = make_publisher(changed, spec, dist.get_rank(), hosts, measurement.control)
        with mock.patch.object(Trial, "loses", return_value=False):  # deltas, whether they pay or not
            pushes = measurement.pushes(publisher, count)
        staging: Any = publisher._transport
        sent: list[Any] = [None] * ranks
        dist.all_gather_object(sent, staging._staging.sent_bytes, group=measurement.control)
        publisher._transport.set_workers([])
        found["with" if delta else "without"] = {"pushes": pushes, "sent_bytes": sum(sent)}
    measurement.share = 1.0
    return found


def memcpy_gbps(num_bytes: int) -> float:
    """10^9 bytes a second that one thread copies from memory to memory: `num_bytes`, in buffers of up to
    MEMCPY_BYTES. The median of five.
    """
    source, target = (numpy.ones(min(num_bytes, MEMCPY_BYTES), dtype=numpy.uint8) for _ in range(2))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        numpy.copyto(target, source)
        times.append(time.perf_counter() - began)
    return len(source) / statistics.median(times) / 1e9


if __name__ == "__main__":
    main(*sys.argv[1:])
