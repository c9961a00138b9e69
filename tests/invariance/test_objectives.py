"""Every objective on ranks: loss, gradient and metrics are those of one rank and one micro-batch a sample,
whatever the layout and the split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.cases import PolicyRun
from support.models import make_tiny_model
from support.objective_reference import AGGREGATIONS, GROUP_KINDS
from support.ranks import run_ranks

from megatron_dapo.config.objective import KINDS

MASK = ["mismatch_correction=mask", "mismatch_low=0.9", "mismatch_high=1.1"]
ADDED = {
    "entropy": ["entropy_coef=0.5"],
    "kl": ["kl_coef=0.3", "kl_estimator=k2", "aggregation=sequence_mean"],
    "kl_in_reward": ["kl_coef=0.1", "kl_estimator=k1", "kl_in=reward"],
    "lm": ["lambda_lm=0.3", "aggregation=constant"],
    "kl_cov": ["covariance=kl"],
    "second_moment": ["mismatch_correction=second_moment", "aggregation=sequence_mean"],
    "geometric": [*MASK, "mismatch_level=geometric", "aggregation=sequence_mean"],
    "masked-gspo": ["kind=gspo", *MASK],
}
# one of each way to make terms and weights; the tests of objectives/ have them all, with threads for ranks
DEFAULTS = {kind: [f"kind={kind}"] for kind in ("dapo", "grpo", "dr_grpo", "gspo", "gmpo", "cispo")}
EVERY = {
    f"{kind}-{how}": [f"kind={kind}", f"aggregation={how}"] for kind in GROUP_KINDS for how in AGGREGATIONS
}
SPLITS = {
    "one": ("tp1", "one"),
    "half": ("tp1", "half"),
    "dp2": ("dp2", "all"),
    "cp2": ("cp2", "all"),
    "tp2": ("tp2", "all"),
}


def measure(folder: Path, cases: dict[str, list[str]]) -> list[dict[str, Any]]:
    """By rank, split and case."""
    shape = {"layers": 2, "heads": 4, "kv_heads": 2, "hidden": 64, "ffn": 64}
    model = str(make_tiny_model(folder / "model", tied=True, **shape))
    runs = [
        PolicyRun(
            name=name, model=model, layout=layout, budget=budget, overrides=["optimizer.distributed=false"]
        )
        for name, (layout, budget) in SPLITS.items()
    ]
    overrides = {name: [f"objective.{item}" for item in items] for name, items in cases.items()}
    return run_ranks(
        "support.jobs_objectives:measure_gradients",
        2,
        runs=runs,
        cases=overrides,
        folder=str(folder),
        timeout_s=550,
    )


def check(by_rank: list[dict[str, Any]], case: str, split: str) -> None:
    whole = by_rank[0]["one"][case]
    reports = [rank[split][case] for rank in by_rank if split in rank]
    for found in reports:
        assert found["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
        assert found["metrics"] == pytest.approx(whole["metrics"], rel=1e-5, abs=1e-7)
        if not split.startswith("tp2"):  # whose ranks have a shard of each parameter
            assert found["norms"] == pytest.approx(whole["norms"], rel=1e-4, abs=1e-5 * whole["grad_norm"])


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("kinds"), DEFAULTS | ADDED)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("every"), EVERY)


@pytest.mark.parametrize("split", [split for split in SPLITS if split != "one"])
@pytest.mark.parametrize("case", [*DEFAULTS, *ADDED])
def test_a_split_changes_nothing(some, case, split):
    check(some, case, split)


def test_the_cases_differ(some):
    """Else an option that nothing reads would pass."""
    norms = {case: round(report["grad_norm"], 7) for case, report in some[0]["one"].items()}
    assert len(set(norms.values())) == len(norms), norms


@pytest.mark.slow
@pytest.mark.parametrize("split", [split for split in SPLITS if split != "one"])
@pytest.mark.parametrize("case", EVERY)
def test_a_split_changes_nothing_with_any_aggregation(every, case, split):
    check(every, case, split)


def test_every_kind_is_among_them():
    assert {*GROUP_KINDS, "ppo", "dpo"} == set(KINDS)
