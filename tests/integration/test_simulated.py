"""The simulator against reality: calibrated with one run of two engines, it predicts another one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.runs import overrides, started

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.simulate import Simulation
from megatron_dapo.rollout.simulate_calibrate import calibrate, load_facts
from megatron_dapo.rollout.simulate_observed import ObservedStream

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 64  # a step wastes between a tenth and two fifths of its tokens
SMALL = {"sampling__prompts_per_step": 16, "rollout__max_tokens": 64}
LARGE = {"sampling__prompts_per_step": 32, "rollout__max_tokens": 160}
WITHIN = 0.15


def make_run(place: SimpleNamespace, name: str, **values: Any) -> Path:
    """Strict sampling on two engines, of a policy that hardly changes; the run's folder."""
    run_dir = place.folder / name
    fixed = {
        "rollout__engines": 2,
        "rollout__seeded": False,
        "sampling__max_age": 0,
        "sampling__samples_per_prompt": 4,  # of which a third is right: a fifth of the groups is all wrong
        "optimizer__lr": 1e-7,
        "batch__max_tokens": 4096,
        "checkpoint__export_hf": False,
        "run__max_steps": STEPS,
    }
    arguments = overrides(place.model, place.data, run_dir, **fixed | values)
    with started(arguments, place.data, place.folder / f"{name}.log") as run:
        assert run.wait() == 0, run.text[-3000:]
    return run_dir


def measured(run_dir: Path) -> tuple[float, float, float]:
    """Seconds of a step, the share of the finished responses' tokens that was not trained on, and its
    standard error by the differences between steps; the first step warms up.
    """
    steps = load_facts(run_dir)[1:]
    seconds = [
        sum(step.phases[name] for name in ("rollout", "old_logprobs", "update", "sync")) for step in steps
    ]
    lines = [json.loads(line) for line in (run_dir / "facts.jsonl").read_text().splitlines()][1:]
    trained = np.array([line["trained_tokens"] for line in lines])
    finished = np.array([sum(sum(group.lengths) for group in step.groups) for step in steps])
    share = 1 - trained.sum() / finished.sum()
    errors = finished - trained - share * finished  # of a ratio's numerator, step by step
    return sum(seconds) / len(seconds), share, float(np.sqrt((errors**2).sum()) / finished.sum())


def predicted(from_dir: Path, of_dir: Path) -> tuple[float, float]:
    """The same of the configuration of `of_dir`, by what `from_dir` has measured."""
    found = calibrate(from_dir, RunConfig.load(from_dir / "config.yaml"))
    config = RunConfig.load(of_dir / "config.yaml")
    longest = config.rollout.max_tokens
    stream = ObservedStream(found.groups, longest=found.longest, seed=0, max_tokens=longest)
    result = Simulation(config, found.profile, stream, engines=found.engines, steps=200).simulate()
    tokens = result["tokens"]
    finished = tokens["generated"] - tokens["wasted_by_reason"].get("aborted", 0)
    return result["step_seconds"], 1 - tokens["trained"] / finished


@pytest.fixture(scope="module")
def runs(place) -> dict[str, Path]:
    return {"small": make_run(place, "small", **SMALL), "large": make_run(place, "large", **LARGE)}


@pytest.mark.parametrize(("source", "target"), [("small", "large"), ("large", "small")])
def test_a_run_predicts_another_with_other_groups_and_lengths(runs, source, target):
    seconds, waste, error = measured(runs[target])
    predicted_seconds, predicted_waste = predicted(runs[source], runs[target])
    print(f"{source} -> {target}: {predicted_seconds:.3f} s, {predicted_waste:.1%} wasted; ", end="")
    print(f"measured {seconds:.3f} s, {waste:.1%} +- {error:.1%}")
    assert predicted_seconds == pytest.approx(seconds, rel=WITHIN)
    assert predicted_waste == pytest.approx(waste, rel=WITHIN)
