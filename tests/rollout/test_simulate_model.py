"""Planned numbers against sums made by hand, and the simulated stream against closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_dapo.config import RunConfig, SamplingConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.simulate_model import Fault, load_profile, plan, speed_at
from megatron_dapo.rollout.simulate_prompts import (
    Difficulty,
    PlannedStream,
    Stream,
    default_difficulties,
    load_difficulties,
)

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def flagship(*overrides: str) -> RunConfig:
    return RunConfig.load(CONFIGS / "qwen32b.yaml", overrides)


def make_stream(*difficulties: Difficulty, max_tokens: int = 10**6) -> Stream:
    return PlannedStream(difficulties, seed=1, max_tokens=max_tokens, prompt_tokens=5)


def test_speed_between_the_sizes_of_a_table():
    table = {2: 10.0, 6: 30.0, 10: 40.0}
    sizes = [1, 2, 3, 6, 8, 10, 99]
    assert [speed_at(table, n) for n in sizes] == pytest.approx([5, 10, 15, 30, 35, 40, 40])


def test_planned_numbers_of_the_flagship():
    profile = plan(flagship())
    # 65.52 GB of weights at 4 x 3.35 TB/s x 0.7 = 9.38 TB/s: 6.985 ms; 4,300 x 262,144 bytes: 0.1202 ms; 3 ms
    assert profile.tokens_per_second[1] == pytest.approx(1 / (0.003 + 0.006985 + 0.0001202), rel=1e-3)
    # 256 x 2 x 32.76e9 FLOP at 4 x 989e12 x 0.5: 8.480 ms, longer than reading the weights
    assert profile.tokens_per_second[256] == pytest.approx(256 / (0.003 + 0.008480 + 0.03076), rel=1e-3)
    # 4 x (0.8 x 80 - 3) GiB = 261.99 GB, less the weights: 196.47 GB
    assert profile.kv_tokens == pytest.approx(196.47e9 / 262_144, rel=1e-3)
    # 128 GPUs x 989e12 x 0.35 / (8 x 32.76e9); with one update 6 x: no pass for old log-probabilities
    assert profile.train_tokens_per_second == pytest.approx(169_060, rel=1e-3)
    assert plan(flagship("batch.updates_per_step=1")).train_tokens_per_second == pytest.approx(
        225_413, rel=1e-3
    )


@pytest.mark.parametrize("name", ["qwen32b", "qwen32b_async", "tiny", "smollm2"])
def test_shipped_configurations_need_no_files(name):
    assert plan(RunConfig.load(CONFIGS / f"{name}.yaml")).kv_tokens > 0


def test_a_file_replaces_planned_numbers(tmp_path):
    file = tmp_path / "speed.json"
    values = {
        "tokens_per_second": {"1": 50, "64": 900},
        "faults": [{"engine": 1, "kind": "stall", "at_s": 9}],
    }
    file.write_text(json.dumps(values))
    profile = load_profile(flagship(), file)
    assert profile.tokens_per_second == {1: 50.0, 64: 900.0}
    assert profile.faults == (Fault(engine=1, kind="stall", at_s=9),)
    assert profile.kv_tokens == plan(flagship()).kv_tokens


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"speed": 1}, "unknown keys speed; known: tokens_per_second"),
        ({"tokens_per_second": {"1": 0}}, "1 sequences at 0.0 tokens/s; both must be above 0"),
        (
            {"faults": [{"engine": 0, "kind": "fire", "at_s": 1}]},
            "kind='fire' must be one of death, stall, slow, failing",
        ),
        ([1], "holds a list, not an object with tokens_per_second"),
    ],
)
def test_bad_speed_files_are_explained(tmp_path, values, message):
    (tmp_path / "speed.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        load_profile(flagship(), tmp_path / "speed.json")


def test_an_unknown_model_is_refused_with_the_remedy():
    with pytest.raises(UserError, match="no planned speeds for other, .*--engine-speed a file with"):
        plan(flagship("model.path=some/other"))


# --- prompts


def test_outcomes_depend_on_prompt_and_version_alone():
    stream = make_stream(Difficulty(pass_rate=0.5, median_tokens=100))
    first = stream.outcome(3, 1, 16)
    stream.next()
    assert stream.outcome(3, 1, 16) == first
    assert stream.outcome(3, 2, 16) != first and stream.outcome(4, 1, 16) != first


def test_lengths_and_verdicts_follow_their_row():
    stream = make_stream(Difficulty(pass_rate=0.3, median_tokens=1000, sigma=0.5, wrong_longer=2.0))
    drawn = [stream.outcome(position, 0, 16) for position in range(2000)]
    right = np.array([verdicts for _, verdicts in drawn])
    lengths = np.array([lengths for lengths, _ in drawn])
    # standard error of a rate 0.3 of 32,000: 0.0026; of a log-normal's median: 1.25 x 0.5 / sqrt(9,600) =
    # 0.6 %
    assert right.mean() == pytest.approx(0.3, abs=4 * 0.0026)
    assert np.median(lengths[right]) == pytest.approx(1000, rel=4 * 0.0065)
    assert np.median(lengths[~right]) == pytest.approx(2000, rel=4 * 0.0045)


def test_responses_are_cut():
    stream = make_stream(Difficulty(pass_rate=1.0, median_tokens=100, sigma=1.0), max_tokens=100)
    lengths = stream.outcome(0, 0, 400)[0]
    assert max(lengths) == 100 and 120 < sum(length == 100 for length in lengths) < 280


def test_rows_are_cycled():
    stream = make_stream(*(Difficulty(pass_rate=p, median_tokens=9) for p in (0.1, 0.2, 0.3)))
    prompts = [stream.next() for _ in range(5)]
    assert [prompt.row for prompt in prompts] == [0, 1, 2, 0, 1]
    assert [(p.position, p.tokens[0], len(p.tokens)) for p in prompts[3:]] == [(3, 3, 5), (4, 4, 5)]


def closed_form(rates: list[float], size: int, right: float, wrong: float) -> tuple[list[float], float]:
    """Shares of the informative groups by rate, and their mean response length, summed over the binomials."""
    informative, tokens = [], 0.0
    for p in rates:
        chance = [math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1)]
        informative.append(sum(chance[1:-1]))
        tokens += sum(chance[k] * (k * right + (size - k) * wrong) / size for k in range(1, size))
    total = sum(informative)
    return [share / total for share in informative], tokens / total


def test_sequential_sampling_is_the_closed_form():
    difficulties = [
        Difficulty(pass_rate=p, median_tokens=100, sigma=0.0, wrong_longer=3.0) for p in (0.2, 0.9)
    ]
    found = make_stream(*difficulties).sequential(SamplingConfig(samples_per_prompt=4), groups=1000)
    shares, mean = closed_form([0.2, 0.9], 4, 100, 300)
    # 50,000 groups: standard error of a share below 0.0023, of the mean about 0.2
    assert found["share_by_pass_rate"] == {
        "0.2": pytest.approx(shares[0], abs=0.008),
        "0.9": pytest.approx(shares[1], abs=0.008),
    }
    assert found["mean_tokens"] == pytest.approx(mean, abs=1.0)


def test_sequential_sampling_without_dynamic_takes_everything():
    stream = make_stream(*(Difficulty(pass_rate=p, median_tokens=50, sigma=0) for p in (0.0, 1.0)))
    found = stream.sequential(SamplingConfig(dynamic=False, samples_per_prompt=2), groups=100)
    assert found == {"mean_tokens": 50.0, "share_by_pass_rate": {"0": 0.5, "1": 0.5}}


def test_a_stream_without_an_informative_group_ends():
    stream = make_stream(Difficulty(pass_rate=0.0, median_tokens=50))
    assert stream.sequential(SamplingConfig(), groups=60_000) == {
        "mean_tokens": None,
        "share_by_pass_rate": {},
    }


def test_the_default_mixture_is_what_the_page_says():
    stream = make_stream(*default_difficulties(20_480), max_tokens=20_480)
    drawn = [stream.outcome(position, 0, 16) for position in range(3000)]
    assert np.mean([length for lengths, _ in drawn for length in lengths]) == pytest.approx(5000, rel=0.03)
    assert np.mean([0 < sum(right) < 16 for _, right in drawn]) == pytest.approx(0.41, abs=0.03)


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"pass_rate": 0.2, "median_tokens": 30, "sigma": 0.8, "wrong_longer": 1.3, "id": 7}\n\n')
    expected = Difficulty(pass_rate=0.2, median_tokens=30, sigma=0.8, wrong_longer=1.3)
    assert load_difficulties(file) == [expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ('{"pass_rate": 0.5}', "line 1: .*median_tokens"),
        ('{"pass_rate": 2, "median_tokens": 5}', "line 1: pass_rate=2.0 must be between 0 and 1"),
        ("[1]", "line 1"),
    ],
)
def test_bad_prompt_files_are_explained(tmp_path, text, message):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        load_difficulties(tmp_path / "prompts.jsonl")
