"""One packed micro-batch through the model: tokens in, log-probabilities of the response tokens out.

Legend: T packed tokens of a micro-batch (padding last), R of them predict a trained response token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dapo.algo.logprobs import logprobs_from_hidden
from megatron_dapo.policy.parallel import Place
from megatron_dapo.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences end to end. `rows_R` are the positions whose *next* token is trained on; the R streams align with them."""

    tokens_1T: torch.Tensor
    positions_1T: torch.Tensor
    bounds: torch.Tensor
    max_length: int
    rows_R: torch.Tensor
    labels_R: torch.Tensor
    rollout_logprobs_R: torch.Tensor
    advantages_R: torch.Tensor
    fresh_R: torch.Tensor
    flat_R: torch.Tensor  # where the predicted tokens stand in the Batch


def make_micro_batch(batch: Batch, indices: Sequence[int], starts: Sequence[int], *, align: int, device: Any) -> MicroBatch:
    """Gather samples `indices` out of the flat batch; `starts` are their offsets in it.

    The total is padded to a multiple of `align` with one extra sequence nothing is learnt from. No indices: padding only.
    """
    lengths = [batch.lengths[i] for i in indices]
    padding = -sum(lengths) % align or (align if not lengths else 0)
    flat_T = torch.cat(
        [torch.arange(starts[i], starts[i] + batch.lengths[i]) for i in indices] or [torch.empty(0, dtype=torch.long)]
    )
    pieces = lengths + [padding] * bool(padding)
    tokens_T = torch.cat([batch.tokens_T[flat_T], torch.zeros(padding, dtype=torch.long)])
    positions_T = torch.cat([torch.arange(length) for length in pieces])
    predicted_T = batch.response_mask_T[flat_T]  # never true for the first token of a sample
    where_R = predicted_T.nonzero().squeeze(1)
    sample_T = torch.repeat_interleave(torch.tensor(list(indices), dtype=torch.long), torch.tensor(lengths, dtype=torch.long))
    return MicroBatch(
        tokens_1T=tokens_T[None].to(device),
        positions_1T=positions_T[None].to(device),
        bounds=torch.tensor([0, *torch.tensor(pieces).cumsum(0).tolist()], dtype=torch.int32, device=device),
        max_length=max(pieces),
        rows_R=(where_R - 1).to(device),
        labels_R=tokens_T[where_R].to(device),
        rollout_logprobs_R=batch.rollout_logprobs_T[flat_T[where_R]].to(device),
        advantages_R=batch.advantages_N[sample_T[where_R]].to(device),
        fresh_R=batch.fresh_N[sample_T[where_R]].to(device),
        flat_R=flat_T[where_R],
    )


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
