"""The batch is the one that sampling one prompt after another gives, whatever finishes first.

Each check is also run against the collector as it was (OldCollector), which must fail it.
"""

from __future__ import annotations

import math
from functools import partial
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.simulated import OldCollector, Outcome, Outcomes, Simulation, outcomes, trained

from megatron_dapo.rollout.collect import Collector

# --- equal to sequential sampling, exactly ------------------------------------------------


def check_equals_sequential(simulation: Simulation, steps: int) -> None:
    collected = simulation.run(steps)
    batches, passed = simulation.sequential(steps)
    assert trained(collected) == batches
    for step, expected in zip(collected, passed, strict=True):
        verdicts = {name: step.counts.get(name, 0) for name in ("all_correct", "all_wrong")}
        assert verdicts == {name: expected[name] for name in verdicts}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pass_rates=st.tuples(st.floats(0.1, 1.0), st.floats(0.1, 1.0)),
    longer=st.sampled_from([0.3, 1.0, 3.0]),
    ticks=st.integers(1, 30),
    max_age=st.integers(0, 3),
    prompts_per_step=st.integers(1, 6),
    concurrency=st.integers(1, 20),
    run_ahead=st.none() | st.integers(0, 20),
    inflight_updates=st.booleans(),
    believed=st.none() | st.floats(0.05, 1.0),
    train_ticks=st.integers(0, 30),
    one_round_at_a_time=st.booleans(),
    kills=st.dictionaries(st.integers(0, 4), st.integers(0, 60), max_size=3),
)
def test_any_order_of_completion_any_run_ahead_and_any_restart_give_the_sequential_batches(
    seed, pass_rates, longer, ticks, **options
):
    outcome = outcomes(seed, pass_rates=pass_rates, longer=longer, ticks=ticks)
    check_equals_sequential(Simulation(outcome=outcome, **options), steps=5)


@pytest.mark.parametrize("max_age", [0, 1])
def test_the_old_collector_does_not_give_the_sequential_batches(max_age):
    outcome = outcomes(0, pass_rates=(0.9, 0.2), longer=3.0)
    options = {"outcome": outcome, "max_age": max_age, "believed": 0.2, "prompts_per_step": 6}
    check_equals_sequential(Simulation(**options), steps=5)
    with pytest.raises(AssertionError):
        check_equals_sequential(Simulation(kind=OldCollector, **options), steps=5)


# --- shares and lengths -------------------------------------------------------------------

STEPS, K = 60, 32
Way = tuple[int, int | None, float]
# max_age, run_ahead, believed pass rate (0.55 in truth): twice the need is launched, or two steps more
STRICT, AGED, FAR_AHEAD = (0, 0, 0.27), (1, 0, 0.27), (2, None, 0.5)


def trained_outcomes(kind: type[Collector], outcome: Outcomes, way: Way) -> list[Outcome]:
    """What was trained on; aged, requests go on between the steps and over the pushes."""
    max_age, run_ahead, believed = way
    simulation = Simulation(
        kind=kind,
        outcome=outcome,
        max_age=max_age,
        run_ahead=run_ahead,
        believed=believed,
        prompts_per_step=K,
        concurrency=150,
        train_ticks=6,
        inflight_updates=True,
    )
    return [outcome(*group) for batch in trained(simulation.run(STEPS)) for group in batch]


def errors_of_share(kind: type[Collector], way: Way, seed: int) -> float:
    """Half the prompts pass at 0.9, half at 0.2: of the informative groups 0.2 / 1.1 = 18.2 % are hard. The
    deviation from that in standard errors.
    """
    groups = trained_outcomes(kind, outcomes(f"share/{seed}", pass_rates=(0.9, 0.2)), way)
    expected = 0.2 / 1.1
    share = fmean(group.hard for group in groups)
    return (share - expected) / math.sqrt(expected * (1 - expected) / len(groups))


def errors_of_length(kind: type[Collector], way: Way, seed: int, longer: float = 1.2) -> float:
    """Hard prompts are `longer` times as long, and uninformative groups again. The deviation of the mean
    trained length from that of informative groups of another part of the stream, in standard errors.
    """
    outcome = outcomes(f"length/{seed}", pass_rates=(0.9, 0.2), longer=longer)
    lengths = [group.ticks for group in trained_outcomes(kind, outcome, way)]
    drawn = [outcome(position, 0) for position in range(10**6, 10**6 + 20_000)]
    reference = [group.ticks for group in drawn if group.informative]
    error = math.hypot(*(pstdev(sample) / math.sqrt(len(sample)) for sample in (lengths, reference)))
    return (fmean(lengths) - fmean(reference)) / error


@pytest.mark.parametrize("way", [STRICT, AGED, FAR_AHEAD])
def test_the_trained_share_of_hard_prompts_is_that_of_sequential_sampling(way):
    assert abs(errors_of_share(Collector, way, seed=0)) < 3


@pytest.mark.parametrize("longer", [1.0, 1.2, 3.0])
@pytest.mark.parametrize("way", [STRICT, AGED, FAR_AHEAD])
def test_the_mean_trained_length_is_that_of_sequential_sampling(way, longer):
    assert abs(errors_of_length(Collector, way, seed=0, longer=longer)) < 3


@pytest.mark.parametrize(
    ("errors", "way"), [(errors_of_share, STRICT), (partial(errors_of_length, longer=1.0), FAR_AHEAD)]
)
def test_the_old_collector_has_the_bias_that_these_look_for(errors, way):
    """It prefers easy prompts (strict) and short responses (aged), by more than three standard errors."""
    assert errors(OldCollector, way, seed=1) < -3
