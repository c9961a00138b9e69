"""One packed micro-batch through the model: tokens in, log-probabilities of the response tokens out.

Legend: T packed tokens of a micro-batch (each sequence padded at its end, padding last), R of this rank's
predict a trained response token. Under context parallelism a rank holds T / cp tokens: of every sequence, cut
into 2 cp chunks, chunk r and chunk 2 cp - 1 - r (batching/zigzag.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dapo.batching.logprobs import logprobs_from_hidden
from megatron_dapo.batching.zigzag import zigzag
from megatron_dapo.layout import Layout, round_up
from megatron_dapo.policy.session import Session
from megatron_dapo.types import Batch, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences end to end: this rank's share of them. `rows_R` are the positions in it whose *next* token is
    trained on; the R streams align with them. `bounds` and `max_length` describe the whole, padded sequences,
    as Megatron wants them.
    """

    tokens_1T: torch.Tensor
    positions_1T: torch.Tensor
    bounds: torch.Tensor
    max_length: int
    num_samples: int  # sequences in `bounds`, the padding's included
    rows_R: torch.Tensor
    labels_R: torch.Tensor
    advantages_R: torch.Tensor
    streams_R: Mapping[Stream, torch.Tensor]
    fresh_R: torch.Tensor
    samples_R: torch.Tensor  # which sample of the micro-batch, from 0
    flat_R: torch.Tensor  # where the predicted tokens stand in the Batch


def make_micro_batch(
    batch: Batch,
    indices: Sequence[int],
    starts: Sequence[int],
    *,
    layout: Layout,
    cp_rank: int,
    align: int,
    device: Any,
) -> MicroBatch:
    """Gather samples `indices` out of the flat batch; `starts` are their offsets in it.

    Under context parallelism each sequence is padded to a multiple of 2 cp. One extra sequence nothing is
    learnt from makes every rank's share a multiple of `align` tokens. No indices: padding only.

    Sample 2 (one prompt token P, one response token a) and sample 1 (two prompt tokens p, two response tokens
    x y) of a batch whose samples 0, 1, 2 start at 0, 3, 7, without context parallelism and with align=4:

        packed      |  P   a |  p   p   x   y |  0   0 |    sequences: bounds 0, 2, 6, 8; the last is padding
        source_T       7   8    3   4   5   6   -1  -1      where each token stands in the batch
        position       0   1    0   1   2   3    0   1
        trained            *            *   *               response tokens of the mask
        rows_R         0            3   4                   the row before each of them predicts it
        labels_R       a            x   y                   and these are the tokens to predict: R = 3
        flat_R         8            5   6                   where the R log-probabilities go in the batch
        samples_R      0            1   1                   sequences of this micro-batch, in its order

    With cp=2 each sequence is first padded to a multiple of 4 and cut into 4 chunks, here of one token each.
    Rank 0 holds the outer two, rank 1 the inner two; a row stays with the rank that holds it, though its
    label may be the other's:

        packed         |  P   a   0   0 |  p   p   x   y |
        rank           |  0   1   1   0 |  0   1   1   0 |
        rank 0 has        P   0            p   y              rows_R 0       labels_R a
        rank 1 has        a   0            p   x              rows_R 2, 3    labels_R x, y
    """
    source_T, sequences = _packed_tokens(batch, indices, starts, layout, align)
    real_T = source_T >= 0
    tokens_T = torch.zeros_like(source_T)
    tokens_T[real_T] = batch.tokens_T[source_T[real_T]].long()
    bounds = torch.tensor([0, *itertools.accumulate(sequences)], dtype=torch.int32)
    mine_T = zigzag(bounds.tolist(), layout.cp, cp_rank)  # packed tokens that this rank holds
    where_R, rows_R = _predicted_here(batch, source_T, mine_T)
    flat_R = source_T[where_R]
    sample_R = torch.bucketize(flat_R, torch.tensor(batch.lengths).cumsum(0), right=True)
    samples_R = torch.bucketize(where_R, bounds[1:], right=True)
    return MicroBatch(
        tokens_1T=tokens_T[mine_T][None].to(device),
        positions_1T=torch.cat([torch.arange(length) for length in sequences])[mine_T][None].to(device),
        bounds=bounds.to(device),
        max_length=max(sequences),
        num_samples=len(sequences),
        rows_R=rows_R.to(device),
        labels_R=tokens_T[where_R].to(device),
        advantages_R=batch.advantages_T[flat_R].to(device),
        streams_R={name: stream_T[flat_R].to(device) for name, stream_T in batch.streams.items()},
        fresh_R=batch.fresh_N[sample_R].to(device),
        samples_R=samples_R.to(device),
        flat_R=flat_R,
    )


def _predicted_here(
    batch: Batch, source_T: torch.Tensor, mine_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which packed tokens are trained on and predicted by a row of this rank, and that row of each."""
    row_T = torch.full_like(source_T, -1)  # of each packed token on this rank, -1: on another
    row_T[mine_T] = torch.arange(len(mine_T))
    real_T = source_T >= 0
    trained_T = torch.zeros_like(real_T)
    trained_T[real_T] = batch.response_mask_T[source_T[real_T]]
    where_R = trained_T.nonzero().squeeze(1)  # never the first token of a sample
    where_R = where_R[row_T[where_R - 1] >= 0]
    return where_R, row_T[where_R - 1]


def _packed_tokens(
    batch: Batch, indices: Sequence[int], starts: Sequence[int], layout: Layout, align: int
) -> tuple[torch.Tensor, list[int]]:
    """Where each packed token stands in the batch (-1: padding), and the padded length of every sequence."""
    padded = [round_up(batch.lengths[i], layout.sequence_multiple) for i in indices]
    unit = math.lcm(layout.sequence_multiple, layout.cp * align)
    filler = -sum(padded) % unit if padded else unit
    source_T = torch.full((sum(padded) + filler,), -1)
    first = 0
    for i, length in zip(indices, padded, strict=True):
        source_T[first : first + batch.lengths[i]] = torch.arange(starts[i], starts[i] + batch.lengths[i])
        first += length
    return source_T, [*padded, filler] if filler else padded


def packed_params(micro: MicroBatch, session: Session) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=micro.bounds,
        cu_seqlens_kv=micro.bounds,
        max_seqlen_q=micro.max_length,
        max_seqlen_kv=micro.max_length,
        cp_group=session.cp_group,
    )


def run_model(chunk: Any, micro: MicroBatch, session: Session) -> torch.Tensor:
    """Hidden states: [T, 1, H] after the final norm on the last pipeline stage (model.HeadlessGPT), [T / sp,
    1, H] before it.
    """
    # as they are computed: Float16Module would copy those of all tokens to fp32
    options = {"fp32_output": False} if chunk.config.bf16 else {}
    packed = packed_params(micro, session)
    return chunk(micro.tokens_1T, micro.positions_1T, None, packed_seq_params=packed, **options)


def response_logprobs(
    hidden_T1H: torch.Tensor,
    weight_VH: torch.Tensor,
    micro: MicroBatch,
    session: Session,
    *,
    vocab_size: int,
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy [R] of the trained tokens, at the sampling temperature, without the padded
    vocabulary.

    `weight_VH` is this rank's shard of the output layer.
    """
    return logprobs_from_hidden(
        hidden_T1H[micro.rows_R, 0],
        weight_VH,
        micro.labels_R,
        vocab_size=vocab_size,
        temperature=temperature,
        first=len(weight_VH) * session.tp_rank,
        group=session.tp_group,
        entropy_gradient=entropy_gradient,
    )
