"""Calibration from facts that a simulated engine of known numbers has made, and from sums made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.simulated_runs import A, B, as_json, make_config, make_profile, record

from megatron_dapo.config import SamplingConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.simulate import Simulation
from megatron_dapo.rollout.simulate_calibrate import calibrate, load_facts
from megatron_dapo.rollout.simulate_fit import nonnegative_least_squares
from megatron_dapo.rollout.simulate_model import speed_at
from megatron_dapo.rollout.simulate_observed import ObservedStream
from megatron_dapo.types import GroupFacts, Timing


def test_a_simulated_runs_own_numbers_are_found(tmp_path):
    config = make_config()
    record(tmp_path, config, make_profile(), steps=12)
    found = calibrate(tmp_path, config)
    for n in (4, 16, 48):
        assert speed_at(found.profile.tokens_per_second, n) == pytest.approx(n / (A + B * n), rel=0.15)
    assert found.profile.sync_s == pytest.approx(0.25)
    assert found.profile.train_tokens_per_second == pytest.approx(9000, rel=0.01)
    assert found.profile.train_s == pytest.approx(0.75, rel=0.02)
    assert found.profile.rollout_s == pytest.approx(0.03, rel=0.01)
    assert (found.engines, found.longest, found.profile.prompt_tokens) == (2, 300, 40)
    assert found.report["assumed"].keys() == {"start_s", "kv_tokens"}
    assert "requests of 2 engines" in found.report["measured"]["tokens_per_second"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """With a strict run on two engines."""
    folder = tmp_path_factory.mktemp("run")
    record(folder, make_config(), make_profile(), steps=30)
    return calibrate(folder, make_config())


@pytest.mark.parametrize(
    ("engines", "sections"),
    [
        (2, {"sampling": {"prompts_per_step": 30}, "rollout": {"max_tokens": 400}}),
        (4, {"sampling": {"prompts_per_step": 24, "max_age": 1}}),
    ],
    ids=["other K and cap", "other engines and age"],
)
def test_another_run_is_predicted(tmp_path, calibrated, engines, sections):
    """The prediction's random numbers are not those of the run that it is compared with."""
    config = make_config(**sections)
    longest = config.rollout.max_tokens
    stream = ObservedStream(calibrated.groups, longest=calibrated.longest, seed=8, max_tokens=longest)
    predicted = Simulation(config, calibrated.profile, stream, engines=engines, steps=20).simulate()
    measured = record(tmp_path, config, make_profile(), steps=20, engines=engines)
    assert predicted["step_seconds"] == pytest.approx(measured["step_seconds"], rel=0.15)
    assert waste(predicted) == pytest.approx(waste(measured), rel=0.15)


def waste(result: dict[str, Any]) -> float:
    tokens = result["tokens"]
    return sum(tokens["wasted_by_reason"].values()) / tokens["generated"]


# --- the parts, by hand


def make_facts(position: int, lengths: tuple[int, ...] = (4, 2), *, verdict: str = "accepted", **values: Any):
    defaults: dict[str, Any] = {
        "row": position,
        "prompt_tokens": 3,
        "correct": (True, False)[: len(lengths)],
        "truncated": (False,) * len(lengths),
        "weight_version": 0,
        "timing": Timing(engine="a", sent=0.0, answered=1.0, graded=1.5),
    }
    return GroupFacts(position=position, lengths=lengths, verdict=verdict, **(defaults | values))


def write_facts(folder: Path, *steps: list[GroupFacts]) -> None:
    lines = [
        {
            "step": number,
            "began": 0.0,
            "phases": [["rollout", 0.0, 2.0], ["update", 2.0, 5.0], ["sync", 5.0, 5.5]],
            "trained_tokens": 50,
            "prompt_tokens_trained": 10,
            "groups": [as_json(group, 0.0) for group in groups],
        }
        for number, groups in enumerate(steps, 1)
    ]
    (folder / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_had_finished_behind_the_last_trained_group_is_left_out(tmp_path):
    """K=2: of the first step 0 to 3, of the second 4 to 6; 9 and 7 are behind."""

    def facts(position: int, verdict: str = "accepted") -> GroupFacts:
        tokens, sent = 4 + position, 0.1 * position
        timing = Timing(engine="a", sent=sent, answered=sent + 0.1 * tokens, graded=1.5)
        return make_facts(position, (tokens, 2), verdict=verdict, timing=timing)

    first = [facts(9), facts(0), facts(1, "all_wrong"), facts(2, "all_wrong"), facts(3)]
    second = [facts(4), facts(5, "all_wrong"), facts(6), facts(7, "all_wrong")]
    write_facts(tmp_path, first, second)
    strict = make_config(sampling={"prompts_per_step": 2, "samples_per_prompt": 2})
    found = calibrate(tmp_path, strict)
    assert [group.position for group in found.groups] == [0, 1, 2, 3, 4, 5, 6]
    aged = make_config(sampling={"prompts_per_step": 2, "samples_per_prompt": 2, "max_age": 1})
    assert [group.position for group in calibrate(tmp_path, aged).groups] == [0, 1, 2, 3, 4, 5, 6]
    assert found.profile.train_tokens_per_second == pytest.approx(60 / 3)
    assert found.profile.sync_s == pytest.approx(0.5)
    assert found.profile.rollout_s == pytest.approx(2 - 1.5)


def test_least_squares_that_are_not_negative():
    factors = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
    found, error = nonnegative_least_squares(factors, factors @ [2.0, 3.0, 0.5])
    assert found == pytest.approx([2.0, 3.0, 0.5]) and error == pytest.approx(0, abs=1e-9)
    found, error = nonnegative_least_squares(factors, np.array([0.5, 3.0, 2.0, 1.0]))
    assert (found >= 0).all() and found.min() == 0 and error > 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*facts.jsonl: No such file.*wants the folder of a run"),
        ("", "tells of no group"),
        ('{"step": 1}\n', "facts.jsonl, line 1: KeyError: 'phases'"),
        ("[1, 2\n", "facts.jsonl, line 1: JSONDecodeError"),
    ],
)
def test_files_that_are_no_facts_are_explained(tmp_path, text, message):
    if text is not None:
        (tmp_path / "facts.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        load_facts(tmp_path)


def test_a_group_without_a_timing_still_has_lengths(tmp_path):
    groups = [make_facts(i) for i in range(9)] + [make_facts(9, timing=None)]
    write_facts(tmp_path, groups)
    config = make_config(sampling={"prompts_per_step": 10, "samples_per_prompt": 2})
    assert len(calibrate(tmp_path, config).groups) == 10


# --- the stream of what was observed


def make_stream(*groups: GroupFacts, longest: int = 100, max_tokens: int = 100) -> ObservedStream:
    return ObservedStream(groups, longest=longest, seed=5, max_tokens=max_tokens)


def test_whole_groups_are_drawn_and_each_as_often_as_it_was_seen():
    groups = [make_facts(i, (10 * i + 1, 10 * i + 2), row=i // 3, prompt_tokens=7 + i // 3) for i in range(4)]
    stream = make_stream(*groups)
    seen = [tuple(stream.outcome(position, 0, 2)[0]) for position in range(4000)]
    counts = {lengths: seen.count(lengths) for lengths in set(seen)}
    assert counts.keys() == {(1, 2), (11, 12), (21, 22), (31, 32)}
    assert all(abs(count - 1000) < 4 * 28 for count in counts.values())  # sqrt(4000 x 1/4 x 3/4) = 27.4
    assert stream.outcome(3, 1, 2) == stream.outcome(3, 1, 2)
    prompt = stream.next()
    assert len(prompt.tokens) == 7 + prompt.row and prompt.position == 0


def test_a_prompt_keeps_its_row_over_the_versions():
    stream = make_stream(*(make_facts(i, (i + 1,) * 2, row=i) for i in range(50)))
    assert all(stream.outcome(p, 0, 2) == stream.outcome(p, 1, 2) for p in range(100))


def test_other_samples_per_prompt_are_drawn_from_the_group():
    stream = make_stream(make_facts(0, (10, 20)))
    lengths, right = stream.outcome(0, 0, 1000)
    assert set(zip(lengths, right, strict=True)) == {(10, True), (20, False)}
    assert 500 - 65 < lengths.count(10) < 500 + 65


def test_a_shorter_cap_cuts_and_then_fewer_are_right():
    """Of the run's cut responses 3 of 12 are right, of the others 9 of 12: a third as many. So of what was
    right, 12 of 24, a third stays right under a cap that cuts everything.
    """
    cut = [make_facts(i, (100, 60), correct=(i < 3, i < 9), truncated=(True, False)) for i in range(12)]
    stream = make_stream(*cut, max_tokens=50)
    drawn = [stream.outcome(position, 0, 2) for position in range(4000)]
    assert {length for lengths, _ in drawn for length in lengths} == {50}
    share = np.mean([verdict for _, right in drawn for verdict in right])
    assert share == pytest.approx(12 / 24 / 3, abs=4 * 0.006)  # sqrt(1/6 x 5/6 / 4,000)


def test_a_shorter_cap_changes_no_verdict_where_cut_responses_were_right_as_often():
    groups = [make_facts(i, (100, 60), correct=(i < 5, i < 6), truncated=(True, False)) for i in range(12)]
    stream = make_stream(*groups, max_tokens=50)
    drawn = [stream.outcome(position, 0, 2)[1] for position in range(300)]
    assert {tuple(right) for right in drawn} == {(True, True), (False, True), (False, False)}
    assert all(right != [True, False] for right in drawn)


def test_a_longer_cap_lets_the_cut_go_on_with_a_geometric_tail():
    """Half of the responses are cut at 100, the others end after 60: a token is the last one with a chance of
    1 / 160. So the cut have 160 more on average.
    """
    stream = make_stream(make_facts(0, (100, 60), truncated=(True, False)), max_tokens=5000)
    first, second = zip(*(stream.outcome(position, 0, 2)[0] for position in range(4000)), strict=True)
    assert set(second) == {60}
    assert np.mean(first) - 100 == pytest.approx(160, abs=4 * 160 / 4000**0.5)
    assert min(first) > 100


def test_sequential_sampling_of_what_was_observed():
    mixed = make_facts(0, (10, 30))
    stream = make_stream(mixed, make_facts(1, (500, 500), correct=(False, False), verdict="all_wrong"))
    found = stream.sequential(SamplingConfig(samples_per_prompt=2), groups=100)
    assert found == {"mean_tokens": 20.0, "share_by_pass_rate": {"0": 0.0, "0.5": 1.0}}
