"""Ranks of a job that does not run: torch's fake process groups, one rank after another."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dapo.config import PolicyConfig
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.sync.regions import MappedBox
from megatron_dapo.weights.names import hf_shapes, row_of
from megatron_dapo.weights.slices import slices_of


def held_in_megatron(model: ModelSpec, layout: Layout) -> list[dict[str, set[MappedBox]]]:
    """By rank, the boxes of every Hugging Face tensor that the model which Megatron builds there holds.

    To be called in a process of its own: the CPU backend changes torch for good.
    """
    from megatron.core import parallel_state

    from megatron_dapo.policy import backend, session

    backend.CPU.prepare()
    new_group, found = dist.new_group, []
    for rank in range(layout.world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        with mock.patch.object(dist, "new_group", lambda ranks=None, **_: new_group(ranks, backend="fake")):
            session.start_megatron(layout)
        found.append(_held_here(model, layout))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return found


def _held_here(model: ModelSpec, layout: Layout) -> dict[str, set[MappedBox]]:
    from megatron.core import parallel_state

    from megatron_dapo.policy import backend
    from megatron_dapo.policy import model as model_file

    stage = parallel_state.get_pipeline_model_parallel_rank()
    session = SimpleNamespace(
        layout=layout,
        backend=backend.CPU,
        pp_rank=stage,
        is_first_stage=stage == 0,
        is_last_stage=stage == layout.pp - 1,
        amax_group=None,
    )
    chunks = model_file.build(model, session, PolicyConfig(), "fp32", seed=0)  # type: ignore[arg-type]
    shapes, found = hf_shapes(model), {}
    for name, _ in model_file.named_shards(chunks):
        tp, tp_rank = layout.tp, parallel_state.get_tensor_model_parallel_rank()
        if row_of(name).expert:
            tp, tp_rank = layout.etp, parallel_state.get_expert_tensor_parallel_rank()
        for part in slices_of(name, model, tp=tp, tp_rank=tp_rank):
            start, size = [0] * len(shapes[part.hf]), list(shapes[part.hf])
            start[part.dim], size[part.dim] = part.hf_start, part.size
            found.setdefault(part.hf, set()).add(MappedBox(tuple(start), tuple(size)))
    return found
