"""A step's batch from rank 0 to the ranks that train on it: each gets its own part.

Rank 0 sends every data-parallel part once, to one rank of that replica, which hands it on to the others of
the replica (they work on the same samples): no rank receives a sample that it does not train on, and rank 0
sends the batch once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.layout import Coordinates
from megatron_dapo.policy.session import Session
from megatron_dapo.types import Batch, Stream

TENSORS = tuple(f.name for f in dataclasses.fields(Batch) if f.name.endswith(("_T", "_N")))


def scatter(batch: Batch | None, session: Session) -> Batch:
    """Collective. `batch` is the whole batch on rank 0 and None elsewhere; returns this rank's
    `Batch.part`.
    """
    mine: Batch | None = None
    if session.rank == 0:
        assert batch is not None, "rank 0 has the batch"
        for dp_rank in range(session.layout.dp):
            part = batch.part(dp_rank)
            leader = session.layout.rank(Coordinates(tp=0, cp=0, dp=dp_rank, pp=0))
            if leader == 0:
                mine = part
            else:
                _send(part, leader, session.control)
    elif session.rank == session.replica_leader:
        mine = _receive(session.control)
    return _broadcast(mine, session.replica_leader, session.replica_group)


def _send(part: Batch, leader: int, group: Any) -> None:
    header, tensors = _split(part)
    dist.send_object_list([header], dst=leader, group=group)
    for tensor in tensors:
        if tensor.numel():
            dist.send(tensor, dst=leader, group=group)


def _receive(group: Any) -> Batch:
    received: list[Any] = [None]
    dist.recv_object_list(received, src=0, group=group)
    tensors = _empty_tensors(received[0])
    for tensor in tensors:
        if tensor.numel():
            dist.recv(tensor, src=0, group=group)
    return _join(received[0], tensors)


def _broadcast(part: Batch | None, leader: int, group: Any) -> Batch:
    header, tensors = _split(part) if part is not None else (None, [])
    shared = [header]
    dist.broadcast_object_list(shared, src=leader, group=group)
    tensors = tensors or _empty_tensors(shared[0])
    for tensor in tensors:
        if tensor.numel():
            dist.broadcast(tensor, src=leader, group=group)
    return part if part is not None else _join(shared[0], tensors)


def _split(part: Batch) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What describes the part, with type and size of every tensor, and the tensors in that order."""
    tensors = {name: getattr(part, name).contiguous() for name in TENSORS}
    tensors |= {str(name): values_T.contiguous() for name, values_T in part.streams.items()}
    rest = {
        f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name not in (*TENSORS, "streams")
    }
    layout = [(name, tensor.dtype, tensor.numel()) for name, tensor in tensors.items()]
    return {"rest": rest, "tensors": layout}, list(tensors.values())


def _empty_tensors(header: Any) -> list[torch.Tensor]:
    return [torch.empty(size, dtype=dtype) for _, dtype, size in header["tensors"]]


def _join(header: Any, tensors: list[torch.Tensor]) -> Batch:
    by_name: dict[str, Any] = {
        name: tensor for (name, _, _), tensor in zip(header["tensors"], tensors, strict=True)
    }
    streams = {Stream(name): by_name.pop(name) for name in list(by_name) if name not in TENSORS}
    return Batch(**header["rest"], **by_name, streams=streams)
