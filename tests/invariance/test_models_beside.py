"""ppo with its value model and dpo with its reference model, on every layout: values, advantages, losses and
gradients are those of float64 transformers, one sequence at a time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import reference
from support.cases import PolicyRun
from support.invariance import RELATIVE
from support.jobs_models import samples_in_pairs, samples_with_rewards
from support.models import make_tiny_model
from support.ranks import run_ranks

LAYOUTS = ("tp1", "tp2_sp", "pp2", "cp2", "dp2")
ON_4 = ("tp2", "pp2_vpp2", "tp2_sp_cp2", "tp2_sp_pp2_vpp2", "dp2_cp2")
HIDDEN, KL, LAMBDA, OF_RETURNS, CLIP, BETA = 64, 0.05, 0.9, 0.8, 0.1, 0.5
OPTIMIZER = ("optimizer.lr=1e-3", "optimizer.eps=1e-5")
PPO = (
    "objective.kind=ppo",
    f"objective.kl_coef={KL}",
    "objective.kl_in=reward",
    "objective.kl_estimator=k1",
    f"objective.gae_lambda={LAMBDA}",
    f"objective.value_gae_lambda={OF_RETURNS}",
    f"objective.value_clip={CLIP}",
    "objective.value_lr=2e-3",
)
DPO = ("objective.kind=dpo", f"objective.beta={BETA}")
HEAD = (0.3 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(7))).tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    shape: dict[str, Any] = dict(layers=4, heads=4, kv_heads=2, hidden=HIDDEN, ffn=64)
    return {
        "policy": str(make_tiny_model(folder / "policy", tied=True, **shape)),
        "reference": str(make_tiny_model(folder / "reference", seed=1, **shape)),
    }


def run_of(models: dict[str, str], kind: str, layout: str, *more: str, **changed: Any) -> PolicyRun:
    keys = PPO if kind == "ppo" else DPO
    return PolicyRun(
        name=f"{kind}-{layout}",
        model=models["policy"],
        layout=layout,
        overrides=[*OPTIMIZER, *keys, f"objective.reference={models['reference']}", *more],
        **({"num_updates": 2 if kind == "ppo" else 1} | changed),
    )


def measured(models: dict[str, str], layouts: tuple[str, ...], ranks: int, folder: Any) -> dict[str, Any]:
    runs = [run_of(models, kind, layout) for layout in layouts for kind in ("ppo", "dpo")]
    if "tp1" in layouts:
        more = ("objective.value_pretraining_steps=1", "batch.updates_per_step=2", "objective.reference=null")
        runs.append(replace(run_of(models, "ppo", "tp1", *more), name="alone"))
    by_rank = run_ranks(
        "support.jobs_models:measure", ranks, runs=runs, head=HEAD, folder=str(folder), timeout_s=500
    )
    for run in runs:
        reports = [report[run.name] for report in by_rank if run.name in report]
        assert all(report == reports[0] for report in reports), "the ranks disagree on what they report"
    return by_rank[0]


@pytest.fixture(scope="module")
def on_2(models, tmp_path_factory):
    return measured(models, LAYOUTS, 2, tmp_path_factory.mktemp("on_2"))


@pytest.fixture(scope="module")
def on_4(models, tmp_path_factory):
    return measured(models, ON_4, 4, tmp_path_factory.mktemp("on_4"))


# --- float64, from the papers


def grad_norm(model: torch.nn.Module, *others: torch.Tensor) -> float:
    gradients = [p.grad for p in (*model.parameters(), *others) if p.grad is not None]
    return math.sqrt(sum(float(g.square().sum()) for g in gradients))


def token_values(model: Any, head: torch.Tensor, sample: Any) -> torch.Tensor:
    """The value of the text before each trained token."""
    hidden = model.model(sample.tokens.long()[None]).last_hidden_state[0, :-1]
    return (hidden @ head)[sample.response_mask[1:]]


def decayed(rewards: list[float], values: list[float], lam: float) -> list[float]:
    """GAE by its sum: A_t = sum over l of lambda^l delta_{t+l}."""
    values = [*values, 0.0]
    deltas = [r + values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum(lam ** (u - t) * deltas[u] for u in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.fixture(scope="module")
def ppo_expected(models) -> dict[str, Any]:
    """Of the first step: streams by sample, and loss and gradient norm of both models in the first update."""
    policy, frozen, of_values = (reference.load(models[m]) for m in ("policy", "reference", "policy"))
    head = torch.tensor(HEAD, dtype=torch.float64, requires_grad=True)
    values, returns, advantages, logprobs = [], [], [], []
    for sample in samples_with_rewards():
        mask = sample.response_mask[1:]
        now = reference.logprobs(policy, sample)[mask]
        with torch.no_grad():
            kl = (now - reference.logprobs(frozen, sample)[mask]).tolist()
        value = token_values(of_values, head, sample)
        rewards = [-KL * k for k in kl]
        if rewards:
            rewards[-1] += float(sample.advantages[0])
        old = value.tolist()
        advantages.append(decayed(rewards, old, LAMBDA))
        returns.append([v + a for v, a in zip(old, decayed(rewards, old, OF_RETURNS), strict=True)])
        values.append(value)
        logprobs.append(now)
    flat = torch.tensor([a for of_sample in advantages for a in of_sample], dtype=torch.float64)
    white = (flat - flat.mean()) / (flat.std() + 1e-6)
    half = sum(len(of_sample) for of_sample in advantages[:6])  # the first of two updates
    loss = -(white[:half] * torch.cat(logprobs[:6])).sum() / half  # its gradient; the ratio is 1 in its value
    loss.backward()
    targets = torch.tensor([r for of_sample in returns for r in of_sample], dtype=torch.float64)
    value_loss = 0.5 * (torch.cat(values[:6]) - targets[:half]).square().mean()
    value_loss.backward()
    return {
        "values": torch.cat(values).detach(),
        "returns": targets,
        "advantages": white,
        "loss": -float(white[:half].mean()),
        "grad_norm": grad_norm(policy),
        "value_loss": float(value_loss.detach()),
        "value_grad_norm": grad_norm(of_values, head),
    }


@pytest.fixture(scope="module")
def dpo_expected(models) -> dict[str, float]:
    policy, frozen = reference.load(models["policy"]), reference.load(models["reference"])
    scores = []
    for sample in samples_in_pairs():
        with torch.no_grad():
            anchor = reference.logprobs(frozen, sample)
        log_ratio = reference.logprobs(policy, sample) - anchor
        scores.append((log_ratio * sample.response_mask[1:]).sum())
    margins = torch.stack([BETA * (scores[i] - scores[i + 1]) for i in range(0, len(scores), 2)])
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    loss.backward()
    return {"loss": float(loss.detach()), "grad_norm": grad_norm(policy), "margin": float(margins.mean())}


# --- tests


def trained(values_T: list[float], samples: list[Any]) -> torch.Tensor:
    return torch.tensor(values_T, dtype=torch.float64)[torch.cat([s.response_mask for s in samples])]


def check_ppo(report: dict[str, Any], one_rank: dict[str, Any], expected: dict[str, Any]) -> None:
    first = report["steps"][0]
    for name in ("values", "returns", "advantages"):
        found = trained(first["streams"][name], samples_with_rewards())
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=2e-5)
    update = first["results"][0]
    for name in ("loss", "grad_norm", "value_loss", "value_grad_norm"):
        assert update[name] == pytest.approx(expected[name], rel=5 * RELATIVE), name
    # what follows depends on the updates before it
    for step, of_one in zip(report["steps"], one_rank["steps"], strict=True):
        for update, single in zip(step["results"], of_one["results"], strict=True):
            for name in ("loss", "grad_norm", "value_loss", "value_grad_norm", "value_clip"):
                assert update[name] == pytest.approx(single[name], rel=1e-3, abs=1e-6), name


def check_dpo(report: dict[str, Any], one_rank: dict[str, Any], expected: dict[str, float]) -> None:
    first = report["steps"][0]["results"][0]
    for name, wanted in expected.items():
        assert first[name] == pytest.approx(wanted, rel=5 * RELATIVE), name
    second, single = (steps[1]["results"][0] for steps in (report["steps"], one_rank["steps"]))
    for name in ("loss", "grad_norm", "margin", "dpo_accuracy", "chosen_logratio"):
        assert second[name] == pytest.approx(single[name], rel=1e-3), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ppo_on_two_ranks_equals_the_reference(on_2, ppo_expected, layout):
    check_ppo(on_2[f"ppo-{layout}"], on_2["ppo-tp1"], ppo_expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpo_on_two_ranks_equals_the_reference(on_2, dpo_expected, layout):
    check_dpo(on_2[f"dpo-{layout}"], on_2["dpo-tp1"], dpo_expected)


def test_a_references_digest_does_not_depend_on_the_layout(on_2):
    digests = {name: report["reference"] for name, report in on_2.items()}
    assert len({digest for name, digest in digests.items() if name != "alone"}) == 1
    assert digests["alone"] != digests["ppo-tp1"]  # its reference is where the policy starts


def test_a_value_model_may_be_trained_alone_first(on_2):
    first, second = on_2["alone"]["steps"]
    assert not first["policy_moved"] and second["policy_moved"]
    assert [update["skipped_updates"] for update in first["results"]] == [1, 1]
    assert all(update["value_loss"] > 0 for step in (first, second) for update in step["results"])
    same = on_2["ppo-tp1"]["steps"][0]["streams"]["values"]
    assert first["streams"]["values"] == same and second["streams"]["values"] != same


@pytest.mark.slow
@pytest.mark.parametrize("layout", ON_4)
def test_other_layouts_equal_the_reference(on_2, on_4, ppo_expected, dpo_expected, layout):
    check_ppo(on_4[f"ppo-{layout}"], on_2["ppo-tp1"], ppo_expected)
    check_dpo(on_4[f"dpo-{layout}"], on_2["dpo-tp1"], dpo_expected)


def test_a_value_model_is_resumed_in_every_bit(models, tmp_path):
    run = run_of(models, "ppo", "dp2", num_updates=1)
    other = run_of(models, "ppo", "tp2", num_updates=1)
    by_rank = run_ranks(
        "support.jobs_models:save_and_resume",
        2,
        run=run,
        other=other,
        head=HEAD,
        folder=str(tmp_path),
        timeout_s=500,
    )
    for found in by_rank:
        assert found["offloading_kept"]
        assert found["resumed"] == found["went_on"]
        moved, kept = (found[name][0]["results"][0] for name in ("at_another_layout", "went_on"))
        for name in ("grad_norm", "value_loss", "value_grad_norm"):
            assert moved[name] == pytest.approx(kept[name], rel=1e-4), name
        assert "made with another reference model" in found["refusal"]
