"""Faults in time: what engines do to a run, with the real rollouts, fleet and collector on a virtual clock.

Every batch is that of the run without the fault: the same prompts with the same responses. And each fault
costs at most the seconds in which it is noticed, and those of the work that has to be done again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.simulate import Simulation
from megatron_dapo.rollout.simulate_model import Fault, Profile
from megatron_dapo.rollout.simulate_prompts import Difficulty, PlannedStream

DIFFICULTIES = [
    Difficulty(pass_rate=rate, median_tokens=40, sigma=0.8, wrong_longer=1.5) for rate in (0.2, 0.0, 0.7, 0.9)
]
ENGINES, STEPS = 3, 3
START_S, SYNC_S, PROGRESS_S = 20.0, 4.0, 30.0


def make_config(*, max_restarts: int = 4, **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"path": "none"},
        "rollout": {
            "max_tokens": 300,
            "max_concurrency": 32,
            "seeded": True,
            "progress_timeout_s": PROGRESS_S,
            "max_restarts": max_restarts,
        },
        "sampling": {"prompts_per_step": 24, "samples_per_prompt": 4, "max_age": 0},
    }
    return RunConfig.make({name: values.get(name, {}) | sections.get(name, {}) for name in values})


def simulate(
    *faults: Fault, config: RunConfig | None = None, messages: list[str] | None = None, **numbers: Any
) -> tuple[Simulation, dict]:
    config = config or make_config()
    defaults: dict[str, Any] = {
        "tokens_per_second": {1: 20.0, 32: 200.0},
        "kv_tokens": 3000,
        "prefill_tokens_per_second": 1000.0,
        "start_s": START_S,
        "sync_s": SYNC_S,
        "train_tokens_per_second": 500.0,
        "prompt_tokens": 5,
    }
    profile = Profile(**(defaults | numbers), faults=faults)
    stream = PlannedStream(DIFFICULTIES, seed=4, max_tokens=config.rollout.max_tokens, prompt_tokens=5)
    say = messages.append if messages is not None else lambda line: None
    simulation = Simulation(config, profile, stream, engines=ENGINES, steps=STEPS, message=say)
    return simulation, simulation.simulate()


@pytest.fixture(scope="module")
def healthy() -> tuple[Simulation, dict]:
    return simulate()


@dataclass(frozen=True)
class Moment:
    """A second of the healthy run: a share of the way through a phase of a step."""

    phase: str
    share: float
    step: int = 0

    def of(self, simulation: Simulation) -> float:
        spans = [(begin, end) for name, begin, end in simulation.timeline.phases if name == self.phase]
        begin, end = spans[self.step]
        return begin + self.share * (end - begin)


def check(healthy: tuple[Simulation, dict], struck: tuple[Simulation, dict], at_most_s: float) -> None:
    """The same batches, no later than so many seconds after the healthy run's end."""
    assert struck[0].batches == healthy[0].batches
    assert sum(map(len, struck[0].batches)) == STEPS * 24
    ends = [simulation.timeline.phases[-1][2] for simulation, _ in (healthy, struck)]
    assert ends[1] - ends[0] <= at_most_s


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_killed_while_generating(healthy, share):
    """Noticed at once. What it had is made again by the other two, in at most the seconds of a rollout."""
    fault = Fault(engine=1, kind="death", at_s=Moment("rollout", share).of(healthy[0]))
    struck = simulate(fault)
    check(healthy, struck, at_most_s=healthy[1]["rollout_seconds"] + START_S)
    assert struck[1]["request_failures"].keys() == {"engine_died"}
    assert struck[1]["tokens"]["wasted_by_reason"]["failed"] > 0


def test_killed_while_it_is_the_slowest(healthy):
    """It is slow by ten, and dies when the others have nothing left to do."""
    slow = Fault(engine=1, kind="slow", at_s=0.0)
    slowed, _ = simulate(slow)
    _, rollout_ends = slowed.timeline.phases[0][1:]
    others = [levels for index, levels in enumerate(slowed.timeline.levels) if index != 1]
    alone = max(max(at for at, n in levels if at < rollout_ends and n == 0) for levels in others)
    assert alone < rollout_ends
    struck = simulate(slow, Fault(engine=1, kind="death", at_s=(alone + rollout_ends) / 2))
    check(healthy, struck, at_most_s=(alone + rollout_ends) / 2 + healthy[1]["rollout_seconds"] + START_S)
    assert struck[1]["request_failures"].keys() == {"engine_died"}


@pytest.mark.parametrize(("phase", "share"), [("begin", 0.05), ("send", 0.5), ("commit", 0.95)])
def test_killed_in_each_phase_of_a_push(healthy, phase, share):
    """The others commit without it; it is started again, and gets the weights of the next push. Until then
    two engines do the work of three.
    """
    at_s = Moment("sync", share).of(healthy[0])
    messages: list[str] = []
    struck = simulate(Fault(engine=2, kind="death", at_s=at_s), messages=messages)
    check(healthy, struck, at_most_s=healthy[1]["rollout_seconds"] + SYNC_S)
    assert struck[1]["request_failures"] == {}
    seconds = struck[0].engines[2].time_in
    assert messages[0].startswith(f"engine_2 failed while weights were pushed ({phase})")
    assert seconds["rollout", "down"] > 0 and seconds["sync", "down"] > 0


def test_killed_twice_in_a_row(healthy):
    """Again as soon as it is back."""
    first = Moment("rollout", 0.3).of(healthy[0])
    faults = [Fault(engine=0, kind="death", at_s=at_s) for at_s in (first, first + START_S + 0.5)]
    struck = simulate(*faults)
    check(healthy, struck, at_most_s=2 * (healthy[1]["rollout_seconds"] + START_S))
    assert struck[1]["request_failures"].keys() == {"engine_died"}
    assert struck[1]["engine_seconds_down"] > 2 * START_S


def test_one_engine_after_the_other_is_killed(healthy):
    """All of them, so that no engine is left with the weights: they are pushed again."""
    at_s = Moment("rollout", 0.4).of(healthy[0])
    struck = simulate(*(Fault(engine=i, kind="death", at_s=at_s + i) for i in range(ENGINES)))
    check(healthy, struck, at_most_s=healthy[1]["rollout_seconds"] + START_S + ENGINES + SYNC_S)
    pushes = [phase for phase, _, _ in struck[0].timeline.phases if phase == "sync"]
    assert len(pushes) == STEPS + 1


def test_never_coming_back(healthy):
    """After its restarts are used up it is left out: two engines do the work of three until the end."""
    fault = Fault(engine=1, kind="death", at_s=Moment("rollout", 0.5).of(healthy[0]), starts_fail=99)
    struck = simulate(fault, config=make_config(max_restarts=2))
    check(healthy, struck, at_most_s=STEPS * healthy[1]["rollout_seconds"])
    assert struck[1]["engine_states"] == {"ready": ENGINES - 1, "dead": 1}
    assert struck[0].engines[1].starts_fail == 99 - 2


def test_stalled(healthy):
    """It answers health and makes no token: noticed after rollout.progress_timeout_s."""
    fault = Fault(engine=1, kind="stall", at_s=Moment("rollout", 0.5).of(healthy[0]))
    struck = simulate(fault)
    check(healthy, struck, at_most_s=PROGRESS_S + healthy[1]["rollout_seconds"] + START_S)
    assert struck[1]["request_failures"].keys() == {"engine_stalled"}
    ends = struck[0].timeline.phases[0][2]
    assert ends >= fault.at_s + PROGRESS_S


def test_stalled_in_a_push_is_noticed_in_the_rollout_after_it(healthy):
    fault = Fault(engine=1, kind="stall", at_s=Moment("sync", 0.5).of(healthy[0]))
    struck = simulate(fault)
    check(healthy, struck, at_most_s=PROGRESS_S + healthy[1]["rollout_seconds"] + START_S)
    assert struck[1]["request_failures"].keys() == {"engine_stalled"}


def test_slow_by_ten(healthy):
    """It makes tokens, so it is not taken for dead. The others get most of the requests, and each round waits
    for those that it has: no rollout takes ten times as long.
    """
    struck = simulate(Fault(engine=1, kind="slow", at_s=0.0))
    check(healthy, struck, at_most_s=STEPS * 9 * healthy[1]["rollout_seconds"])
    assert struck[1]["request_failures"] == {}


def test_one_request_in_a_hundred_fails(healthy):
    struck = simulate(*(Fault(engine=i, kind="failing", at_s=0.0, share=0.01) for i in range(ENGINES)))
    check(healthy, struck, at_most_s=STEPS * healthy[1]["rollout_seconds"])
    failures = struck[1]["request_failures"]
    assert failures.keys() == {"server_error"} and failures["server_error"] >= 1
    assert struck[1]["engine_states"] == {"ready": ENGINES}


def test_out_of_memory_when_it_comes_up_again(healthy):
    """It dies, and the server that replaces it dies at its first request; the one after that works."""
    fault = Fault(engine=1, kind="death", at_s=Moment("rollout", 0.5).of(healthy[0]), warm_ups_fail=1)
    struck = simulate(fault)
    check(healthy, struck, at_most_s=healthy[1]["rollout_seconds"] + 2 * START_S)
    assert struck[1]["engine_states"] == {"ready": ENGINES}
    assert struck[1]["engine_seconds_down"] >= 2 * START_S


def test_a_rollout_of_hours_passes():
    """100 times slower than above: a step's rollout takes more than half an hour, on engines that make a few
    tokens a second.
    """
    quick, _ = simulate()
    slow, result = simulate(tokens_per_second={1: 0.2, 32: 2.0}, prefill_tokens_per_second=10.0)
    assert result["rollout_seconds"] > 1800
    assert slow.batches == quick.batches
    assert result["request_failures"] == {}


@pytest.mark.parametrize("inflight", [True, False])
@pytest.mark.parametrize("kind", ["death", "stall"])
@pytest.mark.parametrize("phase", ["rollout", "trainer", "sync"])
def test_aged_runs_lose_no_prompt(kind, phase, inflight):
    """With max_age 1 sampling goes on while the policy trains, so a fault has an influence on the weights
    that sample; but each prompt of the stream is consumed once, in order.
    """
    sections: dict[str, Any] = {
        "rollout": {"seeded": False, "inflight_updates": inflight},
        "sampling": {"max_age": 1},
    }
    config = make_config(**sections)
    quiet, _ = simulate(config=config)
    fault = Fault(engine=1, kind=kind, at_s=Moment(phase, 0.2, step=phase != "rollout").of(quiet))
    struck, result = simulate(fault, config=config)
    positions = [position for batch in struck.batches for position, *_ in batch]
    assert positions == sorted(set(positions)) and len(positions) == STEPS * 24
    tokens = result["tokens"]
    wasted = sum(tokens["wasted_by_reason"].values())
    assert tokens["generated"] == tokens["trained"] + wasted + tokens["carried"]
    reasons = {"death": {"engine_died"}, "stall": {"engine_stalled"}}
    assert result["request_failures"].keys() == reasons[kind]
