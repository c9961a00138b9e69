"""How long the flagship's engines idle, with an eighth of its prompts, engines and policy GPUs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.simulate import Simulation
from megatron_dapo.rollout.simulate_model import plan
from megatron_dapo.rollout.simulate_prompts import PlannedStream, default_difficulties

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
PART = 8


def simulate(name: str, *, engines: int, steps: int, colocated: bool) -> dict[str, Any]:
    config = RunConfig.load(CONFIGS / f"{name}.yaml")
    prompts = config.sampling.prompts_per_step // PART
    sampling = config.sampling.model_copy(update={"prompts_per_step": prompts})
    config = config.model_copy(update={"sampling": sampling})
    planned = plan(config)
    profile = dataclasses.replace(
        planned, train_tokens_per_second=planned.train_tokens_per_second / PART, colocated=colocated
    )
    longest = config.rollout.max_tokens
    stream = PlannedStream(
        default_difficulties(longest), seed=0, max_tokens=longest, prompt_tokens=profile.prompt_tokens
    )
    return Simulation(config, profile, stream, engines=engines // PART, steps=steps).simulate()


def test_strict_engines_idle_at_most_a_tenth_of_the_step_outside_the_tail():
    """16 nodes, on which engines and policy take turns."""
    result = simulate("qwen32b", engines=32, steps=3, colocated=True)
    idle = result["idle_by_cause"]
    assert idle["sync"] + idle["trainer"] <= 0.10
    assert result["asleep_share"] > 0.1  # the policy has trained
    assert result["age_histogram"].keys() == {"0"}


def test_engines_that_sample_on_idle_at_most_a_twentieth():
    """12 nodes with engines beside 4 that train."""
    result = simulate("qwen32b_async", engines=24, steps=5, colocated=False)
    assert result["idle_share"] <= 0.05
    ages = result["age_histogram"]
    assert ages["1"] > ages["0"] > ages.get("2", 0)
