"""Log-probabilities and entropy from hidden states: the output layer and the softmax in one, without the
logits of all tokens.

Logits take `tokens x vocabulary x 4` bytes (2.5 GB for 4096 x 151,936); here only a block of vocabulary rows
has them at a time. Forward keeps a running maximum and sum per token, as online softmax does, and in the end
the log of the denominator. Backward computes the logits again: with the denominators known a block needs no
other block, and each row of the weight's gradient is one matrix product, written once. (Blocks of tokens
would sum it up: read and written whole for every block, and rounded each time in bf16.)

Legend: R tokens, H hidden size, V vocabulary rows of this tensor-parallel rank, B vocabulary rows of one
block.
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
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label and entropy (nats, fp32, [R] each) of softmax(hidden @ weight.T /
    temperature).

    `weight_VH` is this rank's shard of the output layer, `first` the vocabulary index of its first row,
    `group` the tensor-parallel group (None: not sharded). Rows from `vocab_size` on are padding, with
    probability and gradient 0. The log-probability carries a gradient, the entropy with `entropy_gradient`
    only. That of `hidden_RH` is this rank's share: summing the shares over `group` is left to the caller
    (Megatron's `copy_to_tensor_model_parallel_region` and `gather_from_sequence_parallel_region` do so).
    """
    return _Logprobs.apply(
        hidden_RH,
        weight_VH,
        labels_R - first,
        vocab_size - first,
        temperature,
        group,
        block_bytes,
        entropy_gradient,
    )  # type: ignore[return-value]


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_RH, weight_VH, labels_R, width, temperature, group, block_bytes, entropy_gradient
    ):
        """`labels_R` and `width` (vocabulary rows before the padding) count from this rank's first row."""
        hidden_RH, width = hidden_RH.to(weight_VH.dtype), max(0, min(width, len(weight_VH)))
        num_rows = max(1, block_bytes // (4 * max(1, len(labels_R))))
        softmax = _OnlineSoftmax(labels_R)
        for start in range(0, width, num_rows):
            block = slice(start, min(start + num_rows, width))
            softmax.add(_logits(hidden_RH, weight_VH[block], temperature), start)
        logprobs_R, entropy_R, log_z_R = softmax.finish(group)
        ctx.save_for_backward(hidden_RH, weight_VH, labels_R, log_z_R, entropy_R)
        ctx.width, ctx.temperature, ctx.num_rows = width, temperature, num_rows
        ctx.entropy_gradient = entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_R)
        return logprobs_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With p the probabilities and H the entropy: d logprob / d logits = (onehot(label) - p) /
        temperature, and d H / d logits = -p (log p + H) / temperature.
        """
        hidden_RH, weight_VH, labels_R, log_z_R, entropy_R = ctx.saved_tensors
        # what a row of slopes has in common
        common_R = torch.ones_like(grads[0]) if ctx.entropy_gradient else grads[0]
        scale_R1 = (-common_R / ctx.temperature)[:, None]
        scaled_RH = (hidden_RH * scale_R1).to(weight_VH.dtype)
        grad_hidden_RH = torch.zeros(hidden_RH.shape, device=hidden_RH.device)
        grad_weight_VH = torch.empty_like(weight_VH)
        grad_weight_VH[ctx.width :] = 0
        for start in range(0, ctx.width, ctx.num_rows):
            block = slice(start, min(start + ctx.num_rows, ctx.width))
            logits_RB = _logits(hidden_RH, weight_VH[block], ctx.temperature)
            log_probs_RB = logits_RB.sub_(log_z_R[:, None])
            if ctx.entropy_gradient:
                slope_RB = _slope_with_entropy(log_probs_RB, labels_R - start, entropy_R, *grads)
            else:
                slope_RB = _minus_onehot(log_probs_RB.exp_(), labels_R - start)
            slope_RB = slope_RB.to(weight_VH.dtype)
            torch.mm(slope_RB.T, scaled_RH, out=grad_weight_VH[block])
            grad_hidden_RH += slope_RB @ weight_VH[block]
            del logits_RB, log_probs_RB, slope_RB  # or they would stand beside the next block's
        return grad_hidden_RH.mul_(scale_R1), grad_weight_VH, *[None] * 6


def _logits(hidden_CH: torch.Tensor, weight_BH: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_CB = (hidden_CH @ weight_BH.T).float()
    return logits_CB if temperature == 1.0 else logits_CB.div_(temperature)


class _OnlineSoftmax:
    """Maximum of the logits so far, and relative to it the sums of exp(logit) and exp(logit) * logit; the
    label's logit. All [R].
    """

    def __init__(self, labels_R: torch.Tensor) -> None:
        self.labels_R = labels_R
        shape, device = labels_R.shape, labels_R.device
        self.peak_R = torch.full(
            shape, -1e30, device=device
        )  # finite: nothing times minus infinity is no number
        self.sum_R, self.weighted_R, self.label_R = (torch.zeros(shape, device=device) for _ in range(3))
        self._exp = torch.empty(0, device=device)

    def add(self, logits_RB: torch.Tensor, start: int) -> None:
        """The logits of vocabulary rows `start` and on, which are overwritten."""
        index_R, here_R = _local(self.labels_R - start, logits_RB.shape[1])
        self.label_R += logits_RB.gather(1, index_R[:, None]).squeeze(1) * here_R
        self._rescale(torch.maximum(self.peak_R, logits_RB.amax(dim=-1)))
        logits_RB -= self.peak_R[:, None]
        if self._exp.numel() < logits_RB.numel():
            self._exp = torch.empty_like(logits_RB)
        exp_RB = torch.exp(logits_RB, out=self._exp.view(-1)[: logits_RB.numel()].view(logits_RB.shape))
        self.sum_R += exp_RB.sum(dim=-1)
        self.weighted_R += exp_RB.mul_(logits_RB).sum(dim=-1)

    def finish(self, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probability of the label, entropy and log of the denominator, over the ranks of `group`: [R]
        each.
        """
        peak_R = self.peak_R.clone()
        _reduce(peak_R, group, dist.ReduceOp.MAX)
        self._rescale(peak_R)
        totals_3R = torch.stack([self.sum_R, self.weighted_R, self.label_R])
        _reduce(totals_3R, group, dist.ReduceOp.SUM)
        sum_R, weighted_R, label_R = totals_3R
        log_sum_R = sum_R.log()
        return label_R - peak_R - log_sum_R, log_sum_R - weighted_R / sum_R, peak_R + log_sum_R

    def _rescale(self, peak_R: torch.Tensor) -> None:
        """Make the sums relative to a higher maximum."""
        step_R = self.peak_R - peak_R
        self.weighted_R = (self.weighted_R + step_R * self.sum_R) * step_R.exp()
        self.sum_R = self.sum_R * step_R.exp()
        self.peak_R = peak_R


def _minus_onehot(probs_RB: torch.Tensor, labels_R: torch.Tensor) -> torch.Tensor:
    index_R, here_R = _local(labels_R, probs_RB.shape[1])
    return probs_RB.scatter_add_(1, index_R[:, None], -here_R[:, None].float())


def _slope_with_entropy(
    log_probs_RB: torch.Tensor,
    labels_R: torch.Tensor,
    entropy_R: torch.Tensor,
    grad_logprob_R: torch.Tensor,
    grad_entropy_R: torch.Tensor,
) -> torch.Tensor:
    probs_RB = log_probs_RB.exp()
    of_entropy_RB = log_probs_RB.add_(entropy_R[:, None]).mul_(probs_RB).mul_(grad_entropy_R[:, None])
    return of_entropy_RB.add_(_minus_onehot(probs_RB, labels_R).mul_(grad_logprob_R[:, None]))


def _local(labels_R: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels lie in 0 ... width - 1, and those as an index (0 for the others)."""
    here_R = (labels_R >= 0) & (labels_R < width)
    return torch.where(here_R, labels_R, 0), here_R


def _reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
