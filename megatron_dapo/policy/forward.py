"""One packed micro-batch through the model: tokens in, log-probabilities of the response tokens out.

Legend: T packed tokens of a micro-batch (each sequence padded at its end, padding last), R of this rank's predict a trained
response token. Under context parallelism a rank holds T / cp tokens: of every sequence, cut into 2 cp chunks, chunk r and chunk
2 cp - 1 - r, so that causal attention costs every rank the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dapo.algo.logprobs import logprobs_from_hidden
from megatron_dapo.layout import Layout, round_up
from megatron_dapo.policy.parallel import Place
from megatron_dapo.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences end to end: this rank's share of them. `rows_R` are the positions in it whose *next* token is trained on; the R
    streams align with them. `bounds` and `max_length` describe the whole, padded sequences, as Megatron wants them."""

    tokens_1T: torch.Tensor
    positions_1T: torch.Tensor
    bounds: torch.Tensor
    max_length: int
    rows_R: torch.Tensor
    labels_R: torch.Tensor
    rollout_logprobs_R: torch.Tensor
    advantages_R: torch.Tensor
    fresh_R: torch.Tensor
    samples_R: torch.Tensor  # which sample of the micro-batch, from 0
    flat_R: torch.Tensor  # where the predicted tokens stand in the Batch


def make_micro_batch(
    batch: Batch, indices: Sequence[int], starts: Sequence[int], *, layout: Layout, cp_rank: int, align: int, device: Any
) -> MicroBatch:
    """Gather samples `indices` out of the flat batch; `starts` are their offsets in it.

    Under context parallelism each sequence is padded to a multiple of 2 cp. One extra sequence nothing is learnt from makes every
    rank's share a multiple of `align` tokens. No indices: padding only.
    """
    padded = [round_up(batch.lengths[i], layout.sequence_multiple) for i in indices]
    unit = math.lcm(layout.sequence_multiple, layout.cp * align)
    filler = -sum(padded) % unit if padded else unit
    source_T = torch.full((sum(padded) + filler,), -1)  # where each token stands in the batch; -1: padding
    first = 0
    for i, length in zip(indices, padded, strict=True):
        source_T[first : first + batch.lengths[i]] = torch.arange(starts[i], starts[i] + batch.lengths[i])
        first += length
    real_T = source_T >= 0
    tokens_T = torch.where(real_T, batch.tokens_T[source_T], 0)
    pieces = padded + [filler] * bool(filler)
    bounds = torch.tensor([0, *itertools.accumulate(pieces)], dtype=torch.int32)
    mine_T = zigzag(bounds.tolist(), layout.cp, cp_rank)
    here_T = torch.full_like(source_T, -1)
    here_T[mine_T] = torch.arange(len(mine_T))
    where_R = (real_T & batch.response_mask_T[source_T]).nonzero().squeeze(1)  # never the first token of a sample
    where_R = where_R[here_T[where_R - 1] >= 0]
    flat_R = source_T[where_R]
    sample_R = torch.bucketize(flat_R, torch.tensor(batch.lengths).cumsum(0), right=True)
    samples_R = torch.bucketize(where_R, bounds[1:], right=True)  # sequences of the micro-batch, in its order
    return MicroBatch(
        tokens_1T=tokens_T[mine_T][None].to(device),
        positions_1T=torch.cat([torch.arange(length) for length in pieces])[mine_T][None].to(device),
        bounds=bounds.to(device),
        max_length=max(pieces),
        rows_R=here_T[where_R - 1].to(device),
        labels_R=tokens_T[where_R].to(device),
        rollout_logprobs_R=batch.rollout_logprobs_T[flat_R].to(device),
        advantages_R=batch.advantages_N[sample_R].to(device),
        fresh_R=batch.fresh_N[sample_R].to(device),
        samples_R=samples_R.to(device),
        flat_R=flat_R,
    )


def zigzag(bounds: Sequence[int], cp: int, rank: int) -> torch.Tensor:
    """Which of the packed tokens context-parallel rank `rank` holds, in its order: chunks `rank` and 2 cp - 1 - rank of each sequence."""
    if cp == 1:
        return torch.arange(bounds[-1])
    found = []
    for start, end in itertools.pairwise(bounds):
        size = (end - start) // (2 * cp)
        for chunk in (rank, 2 * cp - 1 - rank):
            found.append(torch.arange(start + chunk * size, start + (chunk + 1) * size))
    return torch.cat(found)


def packed_params(micro: MicroBatch, place: Place) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=micro.bounds,
        cu_seqlens_kv=micro.bounds,
        max_seqlen_q=micro.max_length,
        max_seqlen_kv=micro.max_length,
        cp_group=place.cp_group,
    )


def run_model(chunk: Any, micro: MicroBatch, place: Place) -> torch.Tensor:
    """Hidden states: [T, 1, H] after the final norm on the last pipeline stage (model.HeadlessGPT), [T / sp, 1, H] before it."""
    return chunk(micro.tokens_1T, micro.positions_1T, None, packed_seq_params=packed_params(micro, place))


def response_logprobs(
    hidden_T1H: torch.Tensor, weight_VH: torch.Tensor, micro: MicroBatch, place: Place, *, vocab_size: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy [R] of the trained tokens, at the sampling temperature, without the padded vocabulary.

    `weight_VH` is this rank's shard of the output layer.
    """
    return logprobs_from_hidden(
        hidden_T1H[micro.rows_R, 0],
        weight_VH,
        micro.labels_R,
        vocab_size=vocab_size,
        temperature=temperature,
        first=len(weight_VH) * place.tp_rank,
        group=place.tp_group,
    )
