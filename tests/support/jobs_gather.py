"""What ranks do in the test of the benchmark's full gather (tests/tools/test_bench_weight_sync.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dapo.layout import Layout
from megatron_dapo.sync.sources import holdings
from megatron_dapo.sync.staging import Means
from megatron_dapo.sync.staging_memory import HostMemory
from megatron_dapo.weights.names import hf_shapes
from support.exchanging import MODELS
from support.planning import local_shards
from support.weights import make_weights


def compare() -> list[str]:
    """Tensors that are not what the checkpoint has, after this rank and three others have gathered them."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    from benchmarks.weight_sync_gather import GatheredWeights  # pyright: ignore[reportMissingImports]

    dist.init_process_group("gloo")
    world, rank = dist.group.WORLD, dist.get_rank()
    means = Means(
        rank=rank, control=world, data=world, memory=HostMemory(), delta=False, store=None, timeout_s=30.0
    )
    model, layout = MODELS["tied"], Layout(tp=2, pp=2)
    weights, shapes = make_weights(model), hf_shapes(model)
    shards = local_shards(model, layout, rank, weights)
    gathered, wrong = GatheredWeights(shards, holdings(model, layout), shapes, means), []
    names = list(shapes)
    for bucket in (names[:3], names[2:9], names[9:]):
        gathered.gather(bucket)
        for name in bucket:
            whole = gathered.view(name, (0,) * len(shapes[name]), tuple(shapes[name]))
            if not torch.equal(whole, weights[name]):
                wrong.append(name)
    return wrong
