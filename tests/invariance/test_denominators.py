"""A second kind of objective, registered from outside the package, trains through the same policy: its loss,
gradient and metrics on any split are those of plain torch, whatever the loss is divided by.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import reference
from support.cases import PolicyRun
from support.models import make_tiny_model
from support.ranks import run_ranks
from support.samples import make_samples

CONSTANT = 300
DIVIDED_BY = {"sequences": 6, "constant": CONSTANT}  # six of twelve samples in each of two updates
SPLITS = [("tp1", "half"), ("tp1", "one"), ("dp2", "half"), ("dp2", "one"), ("cp2", "half"), ("pp2", "all")]
CASES = [(divide_by, layout, budget) for divide_by in DIVIDED_BY for layout, budget in SPLITS]


def name_of(case: tuple[str, str, str]) -> str:
    return "-".join(case)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("denominators")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return make_tiny_model(folder / "model", layers=2, heads=4, kv_heads=2, hidden=64, ffn=64)


@pytest.fixture(scope="module")
def measured(model, folder):
    base = PolicyRun(name="", model=str(model), num_updates=2)
    runs = []
    for case in CASES:
        divide_by, layout, budget = case
        overrides = ["objective.kind=reinforce", f"objective.divide_by={divide_by}"]
        overrides += [f"objective.constant={CONSTANT}", "optimizer.clip_grad=0"]
        runs.append(replace(base, name=name_of(case), layout=layout, budget=budget, overrides=overrides))
    return run_ranks("support.jobs_objectives:measure_reinforce", 2, runs=runs, folder=str(folder))


@pytest.fixture(scope="module")
def sums(model):
    """Of the first six samples in plain float64 torch: loss before it is divided, its gradients, and the
    trained tokens' log-probabilities with their advantages.
    """
    loaded = reference.load(model)
    loss, tokens = torch.zeros((), dtype=torch.float64), []
    for sample in make_samples()[:6]:
        logprobs = reference.logprobs(loaded, sample)[sample.response_mask[1:]]
        advantages = sample.advantages[sample.response_mask].double()
        loss = loss - (advantages * logprobs).sum()
        tokens += list(zip(logprobs.tolist(), advantages.tolist(), strict=True))
    loss.backward()
    gradients = {name: p.grad for name, p in loaded.named_parameters()}
    return float(loss.detach()), gradients, tokens


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_loss_and_gradient_are_those_of_plain_torch(measured, sums, folder, case):
    loss, gradients, _ = sums
    divisor = DIVIDED_BY[case[0]]
    reports = [ranks[name_of(case)][0] for ranks in measured if name_of(case) in ranks]
    assert all(report == reports[0] for report in reports)
    assert reports[0]["loss"] == pytest.approx(loss / divisor, rel=1e-5)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values())) / divisor
    assert reports[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    exported = load_file(next((folder / f"{name_of(case)}-gradients").glob("*.safetensors")))
    assert exported.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (exported[name].double() - gradient / divisor).norm() / (gradient / divisor).norm()
        assert float(error) < 1e-5, name


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_objectives_own_metrics_are_reduced_by_their_kind(measured, sums, case):
    _, _, tokens = sums
    report = measured[0][name_of(case)][0]
    assert report["surprise"] == pytest.approx(-sum(lp for lp, _ in tokens) / len(tokens), rel=1e-5)
    assert report["positive_tokens"] == sum(advantage > 0 for _, advantage in tokens)
    assert report["largest_surprise"] == pytest.approx(-min(lp for lp, _ in tokens), rel=1e-5)


def test_metrics_of_dapo_are_not_among_them(measured):
    own = {"surprise", "positive_tokens", "largest_surprise"}
    of_policy = {"loss", "grad_norm", "micro_batches", "skipped_updates", "grad_norm_spike"}
    assert measured[0]["sequences-tp1-half"][0].keys() == own | of_policy


def test_the_denominators_differ_on_these_samples():
    """Else a policy that always divides by tokens would pass."""
    trained = sum(int(sample.response_mask.sum()) for sample in make_samples()[:6])
    assert len({trained, *DIVIDED_BY.values()}) == 3
