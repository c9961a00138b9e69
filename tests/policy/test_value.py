"""The value model's head and optimizer; the rest needs ranks (tests/invariance/test_models_beside.py)."""

from __future__ import annotations

import torch

from megatron_dapo.config import OptimizerConfig, PpoConfig
from megatron_dapo.policy.value import ScalarHead, optimizer_of


def test_its_optimizer_is_the_policys_but_for_learning_rate_and_schedule():
    policys = OptimizerConfig(
        lr=1e-6,
        min_lr=1e-7,
        weight_decay=0.3,
        clip_grad=0.5,
        warmup_updates=9,
        decay="cosine",
        decay_updates=99,
    )
    found = optimizer_of(policys, PpoConfig(value_lr=2e-5, value_warmup_updates=3))
    assert (found.lr, found.warmup_updates, found.decay, found.decay_updates) == (2e-5, 3, "constant", None)
    assert (found.weight_decay, found.clip_grad, found.betas) == (0.3, 0.5, policys.betas)


def test_values_start_at_zero_and_are_fp32():
    head = ScalarHead(4, torch.bfloat16)
    hidden = torch.ones(3, 1, 4, dtype=torch.bfloat16)
    assert head(hidden).tolist() == [[[0.0]]] * 3
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 2**-9]]))
    assert head(hidden)[0, 0].item() == 1 + 2**-9  # bf16 would round it away
