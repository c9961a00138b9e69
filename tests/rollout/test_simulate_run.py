"""Whole simulations: real collector, fleet and sampler on simulated engines."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.simulate import Simulation
from megatron_dapo.rollout.simulate_model import Fault, Profile
from megatron_dapo.rollout.simulate_prompts import Difficulty, PlannedStream

DIFFICULTIES = [
    Difficulty(pass_rate=rate, median_tokens=40, sigma=0.8, wrong_longer=1.5) for rate in (0.2, 0.0, 0.7, 0.9)
]
FIXED = [Difficulty(pass_rate=1.0, median_tokens=10, sigma=0.0)]


def make_config(**sections: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"path": "none"},
        "rollout": {"max_tokens": 200, "max_concurrency": 32},
        "sampling": {"prompts_per_step": 12, "samples_per_prompt": 4, "max_age": 0},
    }
    return RunConfig.make({name: values.get(name, {}) | sections.get(name, {}) for name in values})


def make_profile(**values: Any) -> Profile:
    defaults = {
        "tokens_per_second": {1: 20.0, 32: 200.0},
        "kv_tokens": 3000,
        "prefill_tokens_per_second": 1000.0,
        "start_s": 5.0,
        "sync_s": 1.0,
        "train_tokens_per_second": 500.0,
        "prompt_tokens": 5,
    }
    return Profile(**(defaults | values))


def make(
    config: RunConfig, profile: Profile, *, engines: int = 3, steps: int = 3, rows=DIFFICULTIES, seed: int = 4
) -> Simulation:
    longest, prompt = config.rollout.max_tokens, profile.prompt_tokens
    stream = PlannedStream(rows, seed=seed, max_tokens=longest, prompt_tokens=prompt)
    return Simulation(config, profile, stream, engines=engines, steps=steps)


def run(config: RunConfig, profile: Profile, **options: Any) -> tuple[Simulation, dict[str, Any]]:
    simulation = make(config, profile, **options)
    return simulation, simulation.simulate()


def test_a_step_by_hand():
    """Two prompts of two samples of 10 tokens, all at 10 tokens/s in all: 4 s, and 1 s to read 2 x 5 prompt
    tokens. Training 4 x 15 tokens at 30 a second takes 2 s, the push 0.5 s.
    """
    config = make_config(
        sampling={"prompts_per_step": 2, "samples_per_prompt": 2, "max_prompts": 2, "dynamic": False}
    )
    speeds = {"tokens_per_second": {1: 10.0}, "prefill_tokens_per_second": 10.0}
    profile = make_profile(**speeds, train_tokens_per_second=30.0, sync_s=0.5)
    _, result = run(config, profile, engines=1, steps=2, rows=FIXED)
    assert result["rollout_seconds"] == pytest.approx(5.0)
    assert result["trainer_seconds"] == pytest.approx(2.0)
    assert result["sync_seconds"] == pytest.approx(0.5)
    assert result["step_seconds"] == pytest.approx(7.5)
    assert result["idle_by_cause"] == {
        "tail": pytest.approx(0, abs=1e-9),
        "sync": pytest.approx(0.5 / 7.5),
        "trainer": pytest.approx(2 / 7.5),
    }
    assert result["idle_share"] == pytest.approx(2.5 / 7.5)
    assert result["tokens"] == {"generated": 80, "trained": 80, "carried": 0, "wasted_by_reason": {}}
    assert result["trained"] == {"groups": 4, "mean_tokens": 10.0, "share_by_pass_rate": {"1": 1.0}}
    assert result["age_histogram"] == {"0": 4}


def test_the_tail_is_the_wait_for_the_longest():
    """One engine has the short prompt, the other the long one: 10 of 30 s."""
    config = make_config(
        sampling={"prompts_per_step": 2, "samples_per_prompt": 2, "max_prompts": 2, "dynamic": False},
        rollout={"max_concurrency": 2},
    )
    rows = [Difficulty(pass_rate=1.0, median_tokens=tokens, sigma=0.0) for tokens in (50, 150)]
    profile = make_profile(tokens_per_second={1: 10.0}, prefill_tokens_per_second=1e12, sync_s=0.0)
    _, result = run(config, profile, engines=2, steps=1, rows=rows)
    assert result["rollout_seconds"] == pytest.approx(30.0)
    trainer_s = (2 * 50 + 2 * 150 + 4 * 5) / 500
    assert result["idle_by_cause"]["tail"] == pytest.approx(20 / (2 * (30 + trainer_s)))


@pytest.mark.parametrize("max_age", [0, 1])
def test_every_token_is_accounted_for(max_age):
    simulation, result = run(make_config(sampling={"max_age": max_age}), make_profile(), steps=5)
    tokens = result["tokens"]
    wasted = sum(tokens["wasted_by_reason"].values())
    assert tokens["generated"] == tokens["trained"] + wasted + tokens["carried"]
    assert result["trained"]["groups"] == 5 * 12 == sum(result["age_histogram"].values())
    # what the engines made; parts of tokens are lost with every response that is ended early
    made = sum(engine.tokens for engine in simulation.engines)
    assert tokens["generated"] <= made + 1e-3 and tokens["generated"] == pytest.approx(made, rel=0.02)
    if max_age == 0:
        assert tokens["carried"] == 0 and result["age_histogram"] == {"0": 60}


def test_seconds_of_all_engines_add_up():
    simulation, result = run(make_config(), make_profile())
    for engine in simulation.engines:
        seconds = sum(s for (phase, _), s in engine.time_in.items() if phase != "end")
        assert seconds == pytest.approx(3 * result["step_seconds"])


@pytest.mark.parametrize("kind", ["death", "stall", "slow"])
def test_a_fault_changes_the_seconds_and_not_the_batches(kind):
    config, profile = make_config(), make_profile()
    healthy, before = run(config, profile)
    fault = Fault(engine=1, kind=kind, at_s=3.0)
    struck, after = run(config, make_profile(faults=(fault,)))
    assert struck.batches == healthy.batches
    assert after["step_seconds"] > before["step_seconds"]
    reasons = {"death": {"engine_died"}, "stall": {"engine_stalled"}, "slow": set()}
    assert after["request_failures"].keys() == reasons[kind]
    assert (after["tokens"]["wasted_by_reason"].get("failed", 0) > 0) == (kind != "slow")
    assert (after["engine_seconds_down"] > 0) == (kind != "slow")


def test_the_only_engine_dies_and_is_pushed_to_again():
    config, profile = make_config(), make_profile(faults=(Fault(engine=0, kind="death", at_s=3.0),))
    healthy, _ = run(config, make_profile(), engines=1, steps=2)
    struck, result = run(config, profile, engines=1, steps=2)
    assert struck.batches == healthy.batches
    assert result["sync_seconds"] == pytest.approx((1 + 1 + 1) / 2)


def test_too_many_deaths_end_the_run_as_they_would():
    faults = tuple(Fault(engine=0, kind="death", at_s=at) for at in (1.0, 20.0))
    config = make_config(rollout={"max_restarts": 1})
    with pytest.raises(UserError, match="0 of 1 engines live, fewer than rollout.min_engines=1"):
        run(config, make_profile(faults=faults), engines=1, steps=9)


def test_an_engine_that_does_not_exist_cannot_fail():
    profile = make_profile(faults=(Fault(engine=3, kind="death", at_s=1.0),))
    with pytest.raises(UserError, match="engine=3, there are 3 from 0 on"):
        run(make_config(), profile)


def test_the_same_seed_gives_the_same_run():
    def facts(seed: int) -> tuple[float, Any]:
        simulation, result = run(make_config(), make_profile(), engines=2, steps=2, seed=seed)
        return result["step_seconds"], simulation.timeline.levels

    assert facts(1) == facts(1)
    assert facts(1) != facts(2)
