"""What ranks do in tests/policy/test_batches.py: take a step's batch from rank 0."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.batching.packing import pack
from megatron_dapo.layout import Layout
from megatron_dapo.objectives.base import trained_tokens
from megatron_dapo.policy import session
from megatron_dapo.policy.backend import CPU
from megatron_dapo.policy.batches import scatter
from megatron_dapo.types import Batch, Stream
from support.samples import make_samples


def whole_batch(dp: int) -> Batch:
    """Twelve samples in two updates, with a stream beside the engines' log-probabilities."""
    batch = pack(
        make_samples(), dp=dp, num_updates=2, max_tokens=100, version=0, denominator=trained_tokens
    )  # fmt: skip
    return batch.with_stream(Stream.OLD_LOGPROBS, torch.arange(batch.tokens_T.numel()).float())


def take_part(tp: int, pp: int, dp: int, samples_on_one_rank: bool = False) -> dict[str, Any]:
    """Whether what arrives is this rank's part of the batch, and the bytes of tensors that this rank received
    for it.
    """
    layout = Layout(tp=tp, pp=pp, dp=dp)
    here = session.start(layout, CPU)
    received = _count_received_bytes()
    batch = whole_batch(dp)  # on every rank, to compare with; only rank 0's is sent
    if samples_on_one_rank:
        batch = _first_rank_only(batch)
    part = scatter(batch if here.rank == 0 else None, here)
    expected = batch.part(here.dp_rank)
    tensors = {
        name: getattr(part, name)
        for name in ("tokens_T", "response_mask_T", "advantages_T", "fresh_N", "seed_N")
    }
    same = all(torch.equal(tensor, getattr(expected, name)) for name, tensor in tensors.items())
    same &= part.streams.keys() == expected.streams.keys()
    same &= all(torch.equal(part.streams[name], expected.streams[name]) for name in expected.streams)
    same &= (part.lengths, part.mini_batches) == (expected.lengths, expected.mini_batches)
    by_token = part.tokens_T.nbytes + part.response_mask_T.nbytes + part.advantages_T.nbytes
    by_token += sum(stream.nbytes for stream in part.streams.values())
    return {
        "same": same,
        "received": received[0],
        "part": by_token,
        "dp_rank": here.dp_rank,
        "samples": len(part.lengths),
    }


def _first_rank_only(batch: Batch) -> Batch:
    """All micro-batches of the other data-parallel ranks emptied, as a very small step leaves them."""
    import dataclasses

    minis = [
        dataclasses.replace(
            mini,
            micro_batches=(mini.micro_batches[0], *(((),) * len(rank) for rank in mini.micro_batches[1:])),
        )
        for mini in batch.mini_batches
    ]
    return dataclasses.replace(batch, mini_batches=tuple(minis))


def _count_received_bytes() -> list[int]:
    """A running count of the bytes of float32, bool and int32 tensors that arrive on this rank."""
    count, rank = [0], dist.get_rank()
    recv, broadcast = dist.recv, dist.broadcast
    counted = (torch.float32, torch.bool, torch.int32)

    def counting_recv(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count[0] += tensor.nbytes if tensor.dtype in counted else 0
        return recv(tensor, *args, **kwargs)

    def counting_broadcast(tensor: torch.Tensor, src: int = 0, **kwargs: Any) -> Any:
        count[0] += tensor.nbytes if src != rank and tensor.dtype in counted else 0
        return broadcast(tensor, src=src, **kwargs)

    dist.recv, dist.broadcast = counting_recv, counting_broadcast
    return count
