"""What ranks do in tests/gpu/test_gpu_exchange.py: the same pushes by gloo through memory of the host, and as
on GPUs, side by side.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.layout import Layout
from megatron_dapo.sync.device_memory import Cuda, GpuMemory
from megatron_dapo.sync.exchange import Exchange
from megatron_dapo.sync.plan import Worker
from megatron_dapo.sync.sources import LocalWeights, holdings
from megatron_dapo.sync.staging import Means
from megatron_dapo.sync.staging_memory import HostMemory, MemoryKind
from support.exchanging import MODELS, Case, runtime
from support.planning import local_shards, make_workers
from support.weights import make_weights

HOSTS = {1: "a", 2: "ab", 4: "aabb", 8: "aaaabbbb"}  # of the ranks, by their number


def compare(on_cpu: bool) -> dict[str, Any]:
    """By rank: how many chunks of its workers it has compared, and in which rounds they differ. A rank a GPU,
    over one or two hosts; without GPUs, memory of the host stands for theirs.
    """
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", rank)
    if not on_cpu:
        torch.cuda.set_device(device)
    model, hosts = MODELS["big"], HOSTS[count]
    layout = Layout(pp=min(count, model.num_layers), dp=max(count // model.num_layers, 1))
    workers = make_workers(model, sorted(set(hosts)), tp=1, dtype="bfloat16")
    held = holdings(model, layout)
    case = Case(model="big", layout=layout, hosts=hosts, dtype="bfloat16", chunk_bytes=1 << 18)

    def exchange(memory: MemoryKind, data: Any) -> Exchange:
        means = Means(
            rank=rank,
            control=dist.group.WORLD,
            data=data,
            memory=memory,
            delta=False,
            store=None,
            timeout_s=30.0,
        )
        made = Exchange(means, hosts=hosts, held=held, chunk_bytes=case.chunk_bytes, dtype=case.dtype)
        made.set_workers(workers)
        return made

    plain = exchange(HostMemory(), dist.group.WORLD)
    gpu_runtime = runtime() if on_cpu else Cuda()
    on_gpus = exchange(GpuMemory(device, gpu_runtime), dist.new_group(backend="gloo" if on_cpu else "nccl"))
    found: dict[str, Any] = {"chunks": 0, "differ": []}
    for version in (1, 2):
        shards = local_shards(model, layout, rank, make_weights(model, seed=version))
        moved = [dataclasses.replace(shard, tensor=shard.tensor.to(device)) for shard in shards]
        engines = {worker.engine for worker in workers}
        pushes = [
            made.rounds(LocalWeights(held_shards), version, engines=engines, verify=True)
            for made, held_shards in ((plain, shards), (on_gpus, moved))
        ]
        for number, manifests in enumerate(zip(*pushes, strict=True)):
            chunks = [own_chunks(made, number, workers) for made in (plain, on_gpus)]
            found["chunks"] += len(chunks[0])
            same = all(torch.equal(one, other.cpu()) for one, other in zip(*chunks, strict=True))
            sums = [[m.checksums for of_engine in side.values() for m in of_engine] for side in manifests]
            if not same or sums[0] != sums[1]:
                found["differ"].append((version, number))
            dist.barrier()
    for made in (plain, on_gpus):
        made.set_workers([])
    return found


def own_chunks(exchange: Exchange, number: int, workers: list[Worker]) -> list[torch.Tensor]:
    """Of the workers that this rank carries, as they lie in its memory."""
    staging = exchange._staging
    assert staging is not None
    chunks = []
    for worker in range(len(workers)):
        parcels = [m.parcel for m in staging.plan.rounds[number] if m.worker == worker]
        if staging.plan.carriers[worker] == dist.get_rank() and staging._own and parcels:
            begin = staging.place(number, worker)[1]
            chunks.append(staging._own.bytes[begin:][: sum(parcel.num_bytes for parcel in parcels)])
    return chunks
