"""Fused routers of experts, which nothing here turns on."""

from __future__ import annotations

from typing import Any


def fused_topk_with_score_function(
    logits: Any,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int,
    group_topk: int,
    scaling_factor: float,
    score_function: str,
    expert_bias: Any,
) -> Any:
    raise NotImplementedError("fused router")


def fused_compute_score_for_moe_aux_loss(logits: Any, topk: int, score_function: str) -> Any:
    raise NotImplementedError("fused router")


def fused_moe_aux_loss(
    probs: Any, tokens_per_expert: Any, total_num_tokens: int, num_experts: int, topk: int, coeff: float
) -> Any:
    raise NotImplementedError("fused router")
