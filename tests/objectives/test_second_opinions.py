"""Losses, gradients and advantages of verl 0.9.1 and TRL 1.16 as second opinions, where these are installed
(pip install --no-deps verl==0.9.1 trl==1.16.0, with what their imports need). A development-only check.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from support.objective_reference import AGGREGATIONS, Response, make_inputs, make_responses
from support.samples import make_group, make_prompt, make_sample

from megatron_dapo.config.objective import KINDS
from megatron_dapo.objectives import make_objective
from megatron_dapo.objectives.advantages import with_advantages
from megatron_dapo.objectives.kl import kl_of_tokens

LENGTH = 8  # of the padded rows
MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
# kind -> verl's name, its bounds, our options
VERL: dict[str, tuple[str, dict[str, float], dict[str, Any]]] = {
    "dapo": ("vanilla", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 10.0}, {}),
    "gspo": ("gspo", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}, {}),
    "cispo": (
        "cispo",
        {"clip_ratio_low": 0.25, "clip_ratio_high": 0.2},
        {"eps_low": 0.25, "eps_high": 0.2},
    ),
    "dppo": ("dppo_tv", {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15, "clip_ratio_c": 20.0}, {}),
    "sapo": ("sapo", {}, {}),
    "gmpo": ("geo_mean", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}, {}),
}
CASES = [
    (kind, aggregation)
    for kind in VERL
    for aggregation in (["sequence_mean"] if kind in ("sapo", "gmpo") else AGGREGATIONS)
]


@pytest.fixture(scope="module")
def verl():
    pytest.importorskip("verl", reason="verl is not installed")
    return pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl's imports are not installed")


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl", reason="TRL is not installed")
    return pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL's imports are not installed")


def rows(responses: list[Response], name: str) -> torch.Tensor:
    padded = [list(getattr(r, name)) + [0.0] * (LENGTH - len(getattr(r, name))) for r in responses]
    return torch.tensor(padded, dtype=torch.float64)


def mask_of(responses: list[Response]) -> torch.Tensor:
    return torch.tensor([[t < len(r.now) for t in range(LENGTH)] for r in responses]).double()


def ours(kind: str, responses: list[Response], **options: Any) -> tuple[float, torch.Tensor]:
    """Loss and gradient, as padded rows."""
    objective = make_objective(KINDS[kind](constant_length=LENGTH, **options))  # type: ignore[arg-type]
    inputs, where = make_inputs(responses)
    terms = objective.loss(inputs)
    divisor = objective.denominator([make_sample(range(len(r.now) + 1), 1) for r in responses])
    (terms.loss / divisor).backward()
    gradient = torch.zeros(len(responses), LENGTH, dtype=torch.float64)
    for (i, t), value in zip(where, inputs.logprobs_R.grad, strict=True):
        gradient[i, t] = value
    return float(terms.loss.detach()) / divisor, gradient


@pytest.mark.parametrize(("kind", "aggregation"), CASES)
def test_verl_has_the_same_loss_and_gradient(verl, kind, aggregation):
    name, bounds, options = VERL[kind]
    config = verl.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2, **bounds
    )
    config.global_batch_info["loss_scale_factor"] = LENGTH
    for seed in range(5):
        responses = make_responses(seed) + make_responses(seed, wide=1e-3)
        if kind == "dppo":  # verl has one policy that sampled and from which ratios are taken
            responses = [Response(**{**as_dict(r), "rollout": r.old}) for r in responses]
        now, mask = rows(responses, "now").requires_grad_(), mask_of(responses)
        advantages = torch.tensor([[r.advantage] * LENGTH for r in responses], dtype=torch.float64)
        mode = dict(zip(AGGREGATIONS, MODES, strict=True))[aggregation]
        theirs, _ = verl.get_policy_loss_fn(name)(
            old_log_prob=rows(responses, "old"),
            log_prob=now,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=mode,
            config=config,
        )
        theirs.backward()
        loss, gradient = ours(kind, responses, aggregation=aggregation, **options)
        torch.testing.assert_close(gradient, now.grad * mask, rtol=1e-6, atol=1e-9)
        if kind != "dppo":  # whose value there has log p in the place of 1
            assert loss == pytest.approx(float(theirs.detach()), rel=1e-6)


def as_dict(response: Response) -> dict[str, Any]:
    return {name: getattr(response, name) for name in Response.__dataclass_fields__}


@pytest.mark.parametrize(
    ("estimator", "advantage"),
    [("grpo", "std"), ("rloo", "leave_one_out"), ("reinforce_plus_plus_baseline", "batch_whitened")],
)
def test_verl_has_the_same_advantages(verl, estimator, advantage):
    rewards = [[1.0, -1.0, 0.3], [0.0, 1.0, 1.0, -0.5]]
    groups = [
        make_group(make_prompt(k), lengths=range(1, len(of_group) + 1), rewards=of_group)
        for k, of_group in enumerate(rewards)
    ]
    flat = [reward for of_group in rewards for reward in of_group]
    lengths = [n + 1 for of_group in rewards for n in range(len(of_group))]
    mask = torch.tensor([[t < n for t in range(LENGTH)] for n in lengths]).double()
    scores = torch.zeros(len(flat), LENGTH, dtype=torch.float64)
    scores[:, 0] = torch.tensor(flat)
    index = np.array([k for k, of_group in enumerate(rewards) for _ in of_group])
    theirs, _ = verl.get_adv_estimator_fn(estimator)(
        token_level_rewards=scores, response_mask=mask, index=index
    )
    found = [float(sample.advantages[0]) for sample in with_advantages(groups, advantage=advantage)]
    assert found == pytest.approx(theirs[:, 0].tolist(), rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_verl_has_the_same_kl(verl, estimator):
    responses = make_responses()
    now, reference = rows(responses, "now"), rows(responses, "reference")
    theirs = verl.kl_penalty(now, reference, estimator)
    torch.testing.assert_close(kl_of_tokens(now, reference, estimator), theirs, rtol=1e-9, atol=1e-12)


# kind -> TRL's name of the loss, our options
TRL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "grpo": ("grpo", {"beta": 0.04}, {}),
    "dr_grpo": ("dr_grpo", {}, {}),
    "dapo": ("dapo", {"epsilon_high": 0.28}, {"dual_clip": None}),
    "gspo": (
        "grpo",
        {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"},
        {},
    ),
    "cispo": ("cispo", {"epsilon_high": 1.2}, {"eps_high": 0.2}),
    "sapo": ("sapo", {}, {}),
}


@pytest.mark.parametrize("kind", TRL)
def test_trl_has_the_same_loss_and_gradient(trl, kind):
    loss_type, changed, options = TRL[kind]
    for seed in range(5):
        responses = make_responses(seed) + make_responses(seed, wide=1e-3)
        now, mask = rows(responses, "now").requires_grad_(), mask_of(responses)
        theirs = trl.GRPOTrainer._compute_loss(
            trainer(now, loss_type, changed),
            MagicMock(),
            {
                "prompt_ids": torch.zeros(len(responses), 1),
                "prompt_mask": torch.ones(len(responses), 1),
                "completion_ids": torch.zeros(len(responses), LENGTH),
                "completion_mask": mask,
                "advantages": torch.tensor([r.advantage for r in responses], dtype=torch.float64),
                "old_per_token_logps": rows(responses, "old"),
                "ref_per_token_logps": rows(responses, "reference"),
                "num_items_in_batch": mask.sum(),
            },
        )
        theirs.backward()
        loss, gradient = ours(kind, responses, **options)
        assert loss == pytest.approx(float(theirs.detach()), rel=1e-6)
        torch.testing.assert_close(gradient, now.grad * mask, rtol=1e-6, atol=1e-9)


def trainer(now: torch.Tensor, loss_type: str, changed: dict[str, Any]) -> MagicMock:
    """As much of TRL's trainer as its loss asks for."""
    same = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    values: dict[str, Any] = {
        "loss_type": loss_type,
        "accelerator": same,
        "args": SimpleNamespace(
            delta=None,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            use_bias_correction_kl=False,
        ),
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "max_completion_length": LENGTH,
        "current_gradient_accumulation_steps": 1,
        "use_vllm": False,
        "aux_loss_enabled": False,
        "tools": None,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *args, **kwargs: (now, torch.zeros_like(now), None),
    }
    return MagicMock(**(values | changed))
