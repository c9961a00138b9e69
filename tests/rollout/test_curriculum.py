"""The order of prompts under a curriculum depends on the seed and on the verdicts, and on nothing else: not
on what finishes first, on how far sampling runs ahead, nor on kills and resumes. With simulated engines.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.collecting import MIXED, RIGHT, WRONG
from support.simulated import Outcome, Outcomes, Simulation

from megatron_dapo.config import DataConfig, SamplingConfig
from megatron_dapo.data.prompts import PromptStream
from megatron_dapo.data.rows import Row
from megatron_dapo.types import Prompt

SEED = 5


def one_token(text: str, **_: Any) -> Any:
    """A tokenizer."""
    return {"input_ids": [1]}


class Recorded(PromptStream):
    """Writes down which row each position has, over all resumes, and the verdicts that were recorded."""

    def __init__(self, log: Log, sources: dict, data: DataConfig, lag: int) -> None:
        super().__init__(sources, one_token, data, SEED, lag=lag)  # type: ignore[arg-type]
        self._log = log

    def next(self) -> Prompt | None:
        prompt = super().next()
        if prompt is not None:
            before = self._log.rows.setdefault(prompt.position, prompt.row)
            assert before == prompt.row, "a resume has changed the order"
            self._log.sources[prompt.position] = prompt.source
        return prompt

    def record(self, prompt: Prompt, accuracy: float) -> None:
        assert prompt.position == len(self._log.verdicts), "not once each, in stream order"
        self._log.verdicts.append(accuracy)
        super().record(prompt, accuracy)

    def load_state(self, state: Any) -> None:
        super().load_state(json.loads(json.dumps(state)))


class Log:
    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.sources: dict[int, str | None] = {}
        self.verdicts: list[float] = []


def simulate(sources: dict, outcome: Outcomes, data: DataConfig, *, steps: int, **options: Any) -> Log:
    """Runs steps of a collector; `max_prompts` among the options."""
    log, most, age = Log(), options["max_prompts"], options["max_age"]
    lag = SamplingConfig(max_prompts=most, prompts_per_step=1, max_age=age).most_ahead
    stream = lambda: Recorded(log, sources, data, lag)  # noqa: E731
    Simulation(outcome=outcome, stream=stream, **options).run(steps)
    assert log.verdicts
    return log


def verdicts_of(seed: object, ticks: int = 8) -> Outcomes:
    """1, 2 or 3 of 4 right, seldom none or all, by position and weight version."""

    def outcome(position: int, version: int) -> Outcome:
        chance = random.Random(f"{seed}/{position}/{version}")
        correct = chance.choice([1, 2, 3]) if chance.random() < 0.8 else chance.choice([RIGHT, WRONG])
        return Outcome(correct, ticks=1 + int(2 * ticks * chance.random()))

    return outcome


def expected_rows(num_rows: int, verdicts: list[float], data: DataConfig, lag: int, number: int) -> list[int]:
    """The order as one would write it down by hand: before each turn, look at all verdicts of the row that
    are more than `lag` positions back.
    """
    rows: list[int] = []
    skipped: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))  # (verdicts known then, turns skipped)
    turn = -1
    while len(rows) < number:
        turn += 1
        epoch, place = divmod(turn, num_rows)
        order = list(range(num_rows))
        random.Random(f"prompts/{SEED}/{epoch}").shuffle(order)
        row, position = order[place], len(rows)
        known = [verdicts[p] for p in range(max(0, position - lag)) if rows[p] == row]
        if known:
            then, turns = skipped[row]
            turns = turns if then == len(known) else 0
            if known[-1] >= data.solved and turns < data.skip_solved:
                skipped[row] = (len(known), turns + 1)
                continue
            weights = [pool.weight for pool in data.pools if known[-1] <= pool.up_to]
            chance = random.Random(f"pools/prompts/{SEED}/{turn}").random()
            if weights and weights[0] < 1 and chance >= weights[0]:
                continue
        rows.append(row)
    return rows


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_rows=st.integers(1, 40),
    skip_solved=st.integers(0, 3),
    solved=st.sampled_from([0.5, 0.75, 1.0]),
    pools=st.sampled_from([[], [(0.25, 0.3), (0.5, 1.0), (1.0, 0.5)], [(1.0, 0.4)]]),
    ticks=st.integers(1, 30),
    max_age=st.integers(0, 2),
    prompts_per_step=st.integers(1, 6),
    concurrency=st.integers(1, 20),
    run_ahead=st.none() | st.integers(0, 20),
    inflight_updates=st.booleans(),
    believed=st.none() | st.floats(0.05, 1.0),
    train_ticks=st.integers(0, 30),
    one_round_at_a_time=st.booleans(),
    kills=st.dictionaries(st.integers(0, 5), st.integers(0, 60), max_size=3),
)
def test_the_order_is_a_function_of_seed_and_verdicts(
    seed, num_rows, skip_solved, solved, pools, ticks, **options
):
    pools = [{"up_to": up_to, "weight": weight} for up_to, weight in pools]
    data = DataConfig(skip_solved=skip_solved, solved=solved, pools=pools)
    cap = 4 * options["prompts_per_step"] + 8
    rows = {None: [Row(f"q{i}", "1") for i in range(num_rows)]}
    log = simulate(rows, verdicts_of(seed, ticks), data, steps=6, max_prompts=cap, **options)
    lag = (1 + options["max_age"]) * cap
    drawn = [log.rows[position] for position in range(len(log.rows))]
    assert drawn == expected_rows(num_rows, log.verdicts, data, lag, len(drawn))


# --- shares -------------------------------------------------------------------------------

STEPS, K, ROWS = 60, 16, 200
EASY = range(0, ROWS // 2)  # always 3 of 4 right; the others 1 of 4


def shares(data: DataConfig, max_age: int) -> dict[str, float]:
    """Of all prompts that were consumed behind the first epochs: the share of easy rows."""
    log = Log()

    def outcome(position: int, version: int) -> Outcome:
        ticks = 1 + random.Random(f"{position}/{version}").randrange(12)
        return Outcome(3 if log.rows[position] in EASY else 1, ticks=ticks)

    rows: dict = {None: [Row(f"q{i}", "1") for i in range(ROWS)]}
    options: dict[str, Any] = {"max_age": max_age, "run_ahead": None, "inflight_updates": True}
    stream = lambda: Recorded(log, rows, data, lag=(1 + max_age) * 2 * K)  # noqa: E731
    Simulation(
        outcome=outcome, stream=stream, prompts_per_step=K, max_prompts=2 * K, train_ticks=6, **options
    ).run(STEPS)
    consumed = [log.rows[position] in EASY for position in range(300, len(log.verdicts))]
    return {"easy": sum(consumed) / len(consumed), "number": len(consumed)}


@pytest.mark.parametrize("max_age", [0, 1])
def test_pools_have_the_share_of_their_weights(max_age):
    """Easy prompts are taken at a quarter of their turns: 0.25 / 1.25 = 20 % of the stream. Within three
    standard errors; without pools half the stream is easy.
    """
    pools = [{"up_to": 0.5, "weight": 1.0}, {"up_to": 1.0, "weight": 0.25}]
    found = shares(DataConfig(pools=pools), max_age)
    assert abs(found["easy"] - 0.2) < 3 * (0.2 * 0.8 / found["number"]) ** 0.5
    assert abs(shares(DataConfig(), max_age)["easy"] - 0.5) < 0.05


@pytest.mark.parametrize("max_age", [0, 1])
def test_solved_prompts_have_one_turn_in_m_plus_1(max_age):
    """Skipped for 3 epochs, an easy prompt comes at a quarter of its turns."""
    found = shares(DataConfig(skip_solved=3, solved=0.75), max_age)
    assert abs(found["easy"] - 0.2) < 0.05


@pytest.mark.parametrize("max_age", [0, 2])
def test_sources_have_the_share_of_their_weights(max_age):
    """Weights 3 and 1, whatever the sizes and verdicts: a quarter is from the second, within three standard
    errors of a binomial.
    """
    sources: dict = {
        "large": [Row(f"a{i}", "1") for i in range(500)],
        "small": [Row(f"b{i}", "1") for i in range(7)],
    }
    data = DataConfig(sources=[{"path": "large.jsonl", "weight": 3}, {"path": "small.jsonl", "weight": 1}])
    log = simulate(
        sources, verdicts_of("sources"), data, steps=60, max_age=max_age, prompts_per_step=K, max_prompts=100
    )
    number, counts = len(log.sources), Counter(log.sources.values())
    assert abs(counts["small"] / number - 0.25) < 3 * (0.25 * 0.75 / number) ** 0.5
    turns = [log.rows[p] - 500 for p, name in log.sources.items() if name == "small"]
    assert all(sorted(turns[i : i + 7]) == list(range(7)) for i in range(0, len(turns) - 7, 7)), "its epochs"


def test_an_order_by_what_happens_to_be_known_is_seen():
    """With a lag shorter than sampling runs ahead the order is not that of the verdicts."""
    data, log = DataConfig(skip_solved=2, solved=0.5), Log()
    rows: dict = {None: [Row(f"q{i}", "1") for i in range(5)]}
    Simulation(
        outcome=lambda position, version: Outcome(MIXED, ticks=1 + position % 7),
        stream=lambda: Recorded(log, rows, data, lag=0),
        prompts_per_step=4,
        max_prompts=40,
    ).run(5)
    drawn = [log.rows[position] for position in range(len(log.verdicts))]
    assert drawn != expected_rows(5, log.verdicts, data, 0, len(drawn))
