"""The only calls of Megatron's parallel_state: process groups from a Layout, started once per process, and
this rank's coordinates in them. Every model of the process (policy, reference) lives in the same Session.
"""

from __future__ import annotations

import gc
import os
import secrets
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dapo.errors import UserError
from megatron_dapo.layout import Layout
from megatron_dapo.lifeline import Lifeline, Loss, end_process, rank_name
from megatron_dapo.policy.backend import Backend
from megatron_dapo.policy.control import ControlChannel


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How a kind of parameter is split by tensor parallelism: the rank's part of how many, and whether it is
    the first replica.
    """

    size: int
    rank: int
    first_replica: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """This rank's coordinates and the groups it talks in.

    control: a gloo group of all ranks, on CPU and GPU alike. replica_group: a gloo group of the ranks with
    this rank's dp_rank, which all work on the same samples; replica_leader is the lowest of them. amax_group:
    the ranks that share FP8's delayed scales (tensor, context and data parallel). channel: rank 0's decisions
    on every rank, without a collective that could time out (policy/control.py). lifeline: notices ranks that
    are gone (lifeline.py); None where there is one rank, or no store of torchrun.
    """

    rank: int
    world_size: int
    layout: Layout
    backend: Backend
    device: torch.device
    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int
    etp_rank: int
    expert_dp_rank: int
    tp_group: Any
    dp_group: Any
    cp_group: Any
    amax_group: Any
    control: Any
    replica_group: Any
    replica_leader: int
    channel: ControlChannel
    lifeline: Lifeline | None

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp - 1

    @property
    def reports_loss(self) -> bool:
        """The last stage has the loss, and its tensor-parallel ranks all have the same: the first one speaks
        for them. Context-parallel ranks each speak for their own tokens.
        """
        return self.is_last_stage and self.tp_rank == 0

    def hosts(self) -> list[str]:
        """The host of every rank, by name. Collective."""
        names: list[Any] = [None] * self.world_size
        dist.all_gather_object(names, socket.gethostname(), group=self.control)
        return names

    def shards(self, *, expert: bool) -> Shards:
        if expert:
            return Shards(size=self.layout.etp, rank=self.etp_rank, first_replica=self.expert_dp_rank == 0)
        return Shards(size=self.layout.tp, rank=self.tp_rank, first_replica=self.dp_rank == self.cp_rank == 0)


_session: Session | None = None


def start(layout: Layout, backend: Backend, *, remedy: str = "start it again") -> Session:
    """The session of this process: the first call initialises torch.distributed (from torchrun's environment,
    unless that was done before), the lifeline and Megatron's groups; later ones return the same. Collective.
    When a rank is lost every rank ends, and rank 0 prints who it was, and the `remedy`.

    UserError for another layout or backend than that of the running session, or when the ranks are not as
    many as the layout needs.
    """
    global _session
    if _session is not None:
        if (_session.layout, _session.backend) != (layout, backend):
            raise UserError(
                f"this process already runs {_session.layout.describe()} on the {_session.backend.name}, "
                f"asked for {layout.describe()} on the {backend.name}; models of a process share one layout"
            )
        return _session
    backend.prepare()
    if not dist.is_initialized():
        dist.init_process_group(backend.collectives)
    layout.check_world_size(dist.get_world_size())
    channel = ControlChannel(
        rank=dist.get_rank(),
        store=dist.distributed_c10d._get_default_store(),
        num_ranks=dist.get_world_size(),
    )
    if lifeline := _start_lifeline(channel, remedy):
        channel.leave_it_to_the_lifeline(lifeline.clocks)
    start_megatron(layout)
    _session = _describe(layout, backend, channel, lifeline)
    return _session


def start_megatron(layout: Layout) -> None:
    """Megatron's process groups, in a torch.distributed that runs. Collective."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=True,
    )


def _start_lifeline(channel: ControlChannel, remedy: str) -> Lifeline | None:
    """Collective. Rank 0's address is that of torchrun's store, which runs on the same host; the port and the
    token travel through the store.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if num_ranks == 1 or not isinstance(store, dist.TCPStore):
        return None
    on_one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(num_ranks)

    def on_loss(loss: Loss) -> None:
        # where rank 0 is gone, rank 1 says so, and the first rank of each other host
        speaks = rank == 0 or (not loss.told and (rank == 1 or os.environ.get("LOCAL_RANK") == "0"))
        end_process(loss, speaks=speaks, remedy=remedy)

    if rank > 0:
        port, token = channel.share()
        host = "127.0.0.1" if on_one_host else store.host
        return Lifeline.join((host, port), token, rank_name(rank), on_loss)
    token, others = secrets.token_urlsafe(32), [rank_name(other) for other in range(1, num_ranks)]
    lifeline = Lifeline.serve(token, others, on_loss, address="127.0.0.1" if on_one_host else "")
    channel.share((lifeline.port, token))
    return lifeline


def _describe(
    layout: Layout, backend: Backend, channel: ControlChannel, lifeline: Lifeline | None
) -> Session:
    """What Megatron's groups say of this rank, and our own groups beside them. Collective."""
    rank, dp_rank = dist.get_rank(), parallel_state.get_data_parallel_rank()
    replicas = [
        [r for r in range(layout.world_size) if layout.coordinates(r).dp == d] for d in range(layout.dp)
    ]
    assert rank in replicas[dp_rank], "Megatron orders the ranks as Layout does"
    groups = [dist.new_group(ranks, backend="gloo") for ranks in replicas]  # each made by all ranks
    return Session(
        rank=rank,
        world_size=layout.world_size,
        layout=layout,
        backend=backend,
        device=backend.device(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=dp_rank,
        cp_rank=parallel_state.get_context_parallel_rank(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank() or 0,
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        cp_group=parallel_state.get_context_parallel_group(),
        amax_group=parallel_state.get_amax_reduction_group(with_context_parallel=True),
        control=dist.group.WORLD if backend.collectives == "gloo" else dist.new_group(backend="gloo"),
        replica_group=groups[dp_rank],
        replica_leader=replicas[dp_rank][0],
        channel=channel,
        lifeline=lifeline,
    )


def stop() -> None:
    """Destroy the groups; the process may start others afterwards."""
    global _session
    leave()
    gc.collect()  # a group that is still referred to when Python ends aborts the process, in gloo's threads
    if _session is not None:
        _session.channel.close()
    _session = None
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(failure: str | None = None) -> bool:
    """Say on the lifeline that this process ends now, so that the others do not take it for lost; with
    `failure` they end too. Returns whether there is a lifeline.
    """
    if _session is None or _session.lifeline is None:
        return False
    _session.lifeline.close(failure)
    return True


def settle(timeout_s: float) -> Loss | None:
    """Which rank is lost, when one has closed its connections: it is printed by then. Waits up to `timeout_s`
    to learn of it.
    """
    if _session is None or _session.lifeline is None:
        return None
    return _session.lifeline.settle(timeout_s)
