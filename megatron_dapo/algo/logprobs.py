"""Log-probabilities and entropy from hidden states: the output layer and the softmax in one, without the logits of all tokens.

Logits take `tokens x vocabulary x 4` bytes (2.5 GB for 4096 x 151,936); here only one block of them exists at a time. Forward
goes over the tokens and keeps the log of the softmax's denominator per token. Backward computes the logits again, and goes over
the vocabulary instead: with the denominators known a block of columns needs no other column, and each row of the weight's
gradient is then one matrix product, written once. Summing it up over blocks of tokens would read and write all of it for every
block, and round each time in bf16.

Legend: R tokens, H hidden size, V vocabulary rows of this tensor-parallel rank, C tokens or B vocabulary rows of one block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

BLOCK_BYTES = 64 << 20  # one block of logits in fp32; forward holds two, backward one


def logprobs_from_hidden(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_R: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    first: int = 0,
    group: dist.ProcessGroup | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label and entropy (nats, fp32, [R] each) of softmax(hidden @ weight.T / temperature).

    `weight_VH` is this rank's shard of the output layer, `first` the vocabulary index of its first row, `group` the
    tensor-parallel group (None: not sharded). Rows from `vocab_size` on are padding, with probability and gradient 0.
    Only the log-probability carries a gradient. That of `hidden_RH` is this rank's share: summing the shares over `group` is
    left to the caller (Megatron's `copy_to_tensor_model_parallel_region` and `gather_from_sequence_parallel_region` do so).
    """
    return _Logprobs.apply(hidden_RH, weight_VH, labels_R - first, vocab_size - first, temperature, group, block_bytes)  # type: ignore[return-value]


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, labels_R, width, temperature, group, block_bytes):
        """`labels_R` and `width` (vocabulary rows before the padding) count from this rank's first row."""
        hidden_RH, rows_VH = hidden_RH.to(weight_VH.dtype), weight_VH[:width]
        found_3R = torch.empty(3, len(labels_R), device=hidden_RH.device)
        num_tokens = max(1, block_bytes // (4 * len(weight_VH)))  # from the padded width: the same on every rank
        for start in range(0, len(labels_R), num_tokens):
            block = slice(start, start + num_tokens)
            found_3R[:, block] = _statistics(_logits(hidden_RH[block], rows_VH, temperature), labels_R[block], group)
        logprobs_R, entropy_R, log_z_R = found_3R.unbind()
        ctx.save_for_backward(hidden_RH, weight_VH, labels_R, log_z_R)
        ctx.width, ctx.temperature, ctx.block_bytes = len(rows_VH), temperature, block_bytes
        ctx.mark_non_differentiable(entropy_R)
        return logprobs_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With p the probabilities: d logprob / d logits = (onehot(label) - p) / temperature."""
        hidden_RH, weight_VH, labels_R, log_z_R = ctx.saved_tensors
        scale_R1 = (-grads[0] / ctx.temperature)[:, None]
        scaled_RH = (hidden_RH * scale_R1).to(weight_VH.dtype)
        grad_hidden_RH = torch.zeros(hidden_RH.shape, device=hidden_RH.device)
        grad_weight_VH = torch.empty_like(weight_VH)
        grad_weight_VH[ctx.width :] = 0
        num_rows = max(1, ctx.block_bytes // (4 * max(1, len(labels_R))))
        for start in range(0, ctx.width, num_rows):
            block = slice(start, min(start + num_rows, ctx.width))
            logits_RB = _logits(hidden_RH, weight_VH[block], ctx.temperature)
            slope_RB = _minus_onehot(logits_RB.sub_(log_z_R[:, None]).exp_(), labels_R - start).to(weight_VH.dtype)
            torch.mm(slope_RB.T, scaled_RH, out=grad_weight_VH[block])
            grad_hidden_RH += slope_RB @ weight_VH[block]
            del logits_RB, slope_RB  # or they would stand beside the next block's
        return grad_hidden_RH.mul_(scale_R1), grad_weight_VH, *[None] * 5


def _logits(hidden_CH: torch.Tensor, weight_BH: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_CB = (hidden_CH @ weight_BH.T).float()
    return logits_CB if temperature == 1.0 else logits_CB.div_(temperature)


def _statistics(logits_CV: torch.Tensor, labels_C: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[3, C]: log-probability of the label, entropy, log of the denominator. Overwrites the logits."""
    peak_C = logits_CV.amax(dim=-1)
    _reduce(peak_C, group, dist.ReduceOp.MAX)
    shifted_CV = logits_CV.sub_(peak_C[:, None])
    exp_CV = shifted_CV.exp()
    sum_exp_C = exp_CV.sum(dim=-1)
    exp_CV *= shifted_CV
    index_C, here_C = _local(labels_C, logits_CV.shape[1])
    label_C = shifted_CV.gather(1, index_C[:, None]).squeeze(1) * here_C
    totals = torch.stack([sum_exp_C, exp_CV.sum(dim=-1), label_C])
    _reduce(totals, group, dist.ReduceOp.SUM)
    sum_exp_C, sum_exp_logit_C, label_C = totals
    log_sum_C = sum_exp_C.log()
    return torch.stack([label_C - log_sum_C, log_sum_C - sum_exp_logit_C / sum_exp_C, peak_C + log_sum_C])


def _minus_onehot(probs_RB: torch.Tensor, labels_R: torch.Tensor) -> torch.Tensor:
    index_R, here_R = _local(labels_R, probs_RB.shape[1])
    return probs_RB.scatter_add_(1, index_R[:, None], -here_R[:, None].float())


def _local(labels_R: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels lie in 0 ... width - 1, and those as an index (0 for the others)."""
    here_R = (labels_R >= 0) & (labels_R < width)
    return torch.where(here_R, labels_R, 0), here_R


def _reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
