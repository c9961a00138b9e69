"""The only calls of Megatron's parallel_state: process groups from a Layout, and where this rank stands in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dapo.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How a kind of parameter is split by tensor parallelism: the rank's part of how many, and whether it is the first replica."""

    size: int
    rank: int
    first_replica: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This rank's coordinates and the groups it talks in. `control` is a gloo group of all ranks, on CPU and GPU alike."""

    rank: int
    layout: Layout
    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int
    etp_rank: int
    expert_dp_rank: int
    tp_group: Any
    dp_group: Any
    cp_group: Any
    amax_group: Any  # the ranks that share FP8's delayed scales: tensor, context and data parallel
    control: Any

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp - 1

    def shards(self, *, expert: bool) -> Shards:
        if expert:
            return Shards(size=self.layout.etp, rank=self.etp_rank, first_replica=self.expert_dp_rank == 0)
        return Shards(size=self.layout.tp, rank=self.tp_rank, first_replica=self.dp_rank == self.cp_rank == 0)

    @property
    def reports_loss(self) -> bool:
        """One rank of each data-parallel replica speaks for it."""
        return self.is_last_stage and self.tp_rank == 0


def start(layout: Layout, backend: str) -> Place:
    """Initialise torch.distributed (from torchrun's environment) and Megatron's groups. `backend` is 'gloo' or 'nccl'."""
    if not dist.is_initialized():
        dist.init_process_group(backend)
    layout.check_world_size(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=True,
    )
    return Place(
        rank=dist.get_rank(),
        layout=layout,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank() or 0,
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        cp_group=parallel_state.get_context_parallel_group(),
        amax_group=parallel_state.get_amax_reduction_group(with_context_parallel=True),
        control=dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo"),
    )


def stop() -> None:
    """Destroy the groups; the process may start others afterwards."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
