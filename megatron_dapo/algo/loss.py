"""The DAPO objective as sums over tokens (arXiv 2503.14476, eq. 8). The optimizer step owns the denominator.

Legend: T tokens of one micro-batch, V vocabulary entries of this tensor-parallel rank.
Three policies, three names: rollout_logprobs (engine), old_logprobs (policy at collection), logprobs (policy now).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """Sums over the trained tokens of one micro-batch; divide by the tokens of the whole mini-batch, once.

    `loss` carries the gradient; everything else is detached.
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    clip_low: torch.Tensor
    clip_high: torch.Tensor
    kl_old: torch.Tensor


def dapo_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    weights_T: torch.Tensor | None = None,
    *,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None,
) -> LossSums:
    """Sum over masked-in tokens of -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), bounded below by `dual_clip` * A for A < 0.

    `weights_T` (detached, algo/mismatch.py) multiplies each token's term; None is 1.

    Returns sums: the loss, the number of tokens, how many tokens each clip side held back, and the k3 estimate of
    KL(old || now). The ratio is masked before `exp`, so that whatever stands outside the mask cannot reach the result.
    """
    log_ratio_T = torch.where(mask_T, logprobs_T - old_logprobs_T, 0.0)
    ratio_T = log_ratio_T.exp()
    objective_T = torch.minimum(ratio_T * advantages_T, ratio_T.clamp(1 - eps_low, 1 + eps_high) * advantages_T)
    if dual_clip is not None:
        bounded_T = torch.maximum(objective_T, dual_clip * advantages_T)
        objective_T = torch.where(advantages_T < 0, bounded_T, objective_T)
    if weights_T is not None:
        objective_T = objective_T * weights_T
    with torch.no_grad():
        clip_low = (mask_T & (advantages_T < 0) & (ratio_T < 1 - eps_low)).sum()
        clip_high = (mask_T & (advantages_T > 0) & (ratio_T > 1 + eps_high)).sum()
        kl_old = (ratio_T - 1 - log_ratio_T).sum()  # k3; exactly 0 outside the mask
    return LossSums(
        loss=-torch.where(mask_T, objective_T, 0.0).sum(),
        num_tokens=mask_T.sum(),
        clip_low=clip_low,
        clip_high=clip_high,
        kl_old=kl_old,
    )


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV: torch.Tensor, labels_T: torch.Tensor, first: int, group: dist.ProcessGroup | None):
        logits_TV = logits_TV.float()
        sums = torch.empty(3, logits_TV.shape[0], device=logits_TV.device)  # sum of exp, sum of exp * logit, label's logit
        peak_T = logits_TV.amax(dim=-1)
        _reduce(peak_T, group, dist.ReduceOp.MAX)
        shifted_TV = logits_TV - peak_T[:, None]
        exp_TV = shifted_TV.exp()
        here_T = (labels_T >= first) & (labels_T < first + logits_TV.shape[1])
        local_T = torch.where(here_T, labels_T - first, 0)
        sums[0] = exp_TV.sum(dim=-1)
        sums[1] = torch.linalg.vecdot(exp_TV, shifted_TV)
        sums[2] = torch.where(here_T, shifted_TV.gather(1, local_T[:, None]).squeeze(1), 0.0)
        _reduce(sums, group, dist.ReduceOp.SUM)
        log_z_T = sums[0].log()
        ctx.save_for_backward(exp_TV.div_(sums[0][:, None]), local_T, here_T)
        entropy_T = log_z_T - sums[1] / sums[0]
        ctx.mark_non_differentiable(entropy_T)
        return sums[2] - log_z_T, entropy_T

    @staticmethod
    def backward(ctx, *grads):
        grad_T = grads[0]
        probs_TV, local_T, here_T = ctx.saved_tensors
        grad_TV = probs_TV * -grad_T[:, None]
        grad_TV.scatter_add_(1, local_T[:, None], torch.where(here_T, grad_T, 0.0)[:, None])
        return grad_TV, None, None, None


def vocab_parallel_logprobs(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, *, first: int = 0, group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label and entropy (nats, fp32, [T] each) from logits sharded over the vocabulary.

    `first` is the vocabulary index of this rank's first column, `group` the tensor-parallel group (None: not sharded).
    Only the log-probability carries a gradient.
    """
    return _VocabParallelLogprobs.apply(logits_TV, labels_T, first, group)  # type: ignore[return-value]


def _reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
