"""Which accuracies are informative."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.samples import make_group

from megatron_dapo.batching.filtering import Window, ladder, metric_of, next_level, widened

ACCURACIES = [0.0, 0.25, 0.3, 0.5, 0.7, 0.75, 1.0]


@pytest.mark.parametrize(
    ("window", "accepted"),
    [
        (Window(), [0.25, 0.3, 0.5, 0.7, 0.75]),
        (Window(low=0.3, high=0.7), [0.5]),
        (Window(low=0.3, high=0.7, inclusive=True), [0.3, 0.5, 0.7]),
        (Window(inclusive=True), ACCURACIES),
    ],
)
def test_windows(window, accepted):
    assert [a for a in ACCURACIES if window.judge(a) == "accepted"] == accepted


def test_what_is_refused_is_named():
    window = Window(low=0.3, high=0.7)
    assert [window.judge(a) for a in (0.0, 0.3, 0.7, 1.0)] == [
        "all_wrong",
        "outside_window",
        "outside_window",
        "all_correct",
    ]


@pytest.mark.parametrize("window", [Window(), Window(low=0.3, high=0.7, inclusive=True)])
def test_a_group_without_any_grade_is_refused_as_such(window):
    assert window.judge(math.nan) == "ungraded"


def test_widening_goes_half_way_until_only_the_extremes_are_out():
    window, seen = Window(low=0.4, high=0.6, inclusive=True), []
    while (wider := widened(window)) is not None:
        seen.append((round(wider.low, 4), round(wider.high, 4)))
        window = wider
    assert seen == [(0.2, 0.8), (0.1, 0.9), (0.05, 0.95), (0.0, 1.0)]
    assert [a for a in ACCURACIES if window.judge(a) == "accepted"] == ACCURACIES[1:-1]


def test_one_end_at_its_limit_widens_the_other_alone():
    wider = widened(Window(low=0.0, high=0.5))
    assert wider is not None and (wider.low, wider.high) == (0.0, 0.75)


@pytest.mark.parametrize(
    "window", [Window(low=0.01, high=0.5, inclusive=True), Window(low=0.5, high=1.0, inclusive=True)]
)
def test_widening_never_lets_in_groups_without_an_advantage(window):
    while (wider := widened(window)) is not None:
        window = wider
        assert window.judge(0.0) == "all_wrong" and window.judge(1.0) == "all_correct"
    assert (window.low, window.high) == (0.0, 1.0)


# --- other metrics than accuracy ----------------------------------------------------------


def test_a_group_is_judged_by_its_graded_completions():
    """By hand: rewards 1, -1, 0.5 and one without a grade."""
    group = make_group(correct=1, size=4, rewards=(1.0, -1.0, 0.5, 9.0))
    group = dataclasses.replace(group, correct=(True, False, False, None))
    assert metric_of(group, "accuracy") == 1 / 3
    assert metric_of(group, "reward_mean") == pytest.approx(0.5 / 3)
    mean = 0.5 / 3
    squares = (1 - mean) ** 2 + (-1 - mean) ** 2 + (0.5 - mean) ** 2
    assert metric_of(group, "reward_std") == pytest.approx(math.sqrt(squares / 2))
    one = dataclasses.replace(group, correct=(True, None, None, None))
    assert (metric_of(one, "reward_std"), metric_of(one, "reward_mean")) == (0.0, 1.0)
    none = dataclasses.replace(group, correct=(None,) * 4)
    assert all(math.isnan(metric_of(none, metric)) for metric in ("accuracy", "reward_std", "reward_mean"))


def test_equal_rewards_have_no_deviation():
    group = make_group(correct=4, size=4, rewards=(0.1 + 0.2,) * 4)
    assert metric_of(group, "reward_std") == 0.0


def test_a_window_of_another_metric_names_what_it_refuses_by_the_accuracy():
    window = Window(low=0.0, high=math.inf)
    cases = [(1.0, 0.2), (1.0, 0.0), (0.0, 0.0), (0.5, 0.0), (math.nan, math.nan)]
    verdicts = ["accepted", "all_correct", "all_wrong", "outside_window", "ungraded"]
    assert [window.judge(accuracy, value) for accuracy, value in cases] == verdicts


# --- a window that moves ------------------------------------------------------------------


def test_a_ladder_begins_with_the_window_itself():
    windows = ladder(Window(low=0.4, high=0.6, inclusive=True))
    lows = [round(window.low, 4) for window in windows]
    assert lows == [0.4, 0.2, 0.1, 0.05, 0.0] and windows[0] == Window(low=0.4, high=0.6, inclusive=True)
    assert ladder(Window()) == [Window()]


@pytest.mark.parametrize(
    ("level", "accuracies", "expected"),
    [
        (0, [0.5, 0.5, 0.3, 0.0], 0),  # half are in (0.4, 0.6)
        (0, [0.5, 0.3, 0.3, 0.0], 1),  # a quarter is
        (1, [0.5, 0.5, 0.3, 0.0], 0),  # the narrower one would have had half
        (1, [0.5, 0.3, 0.3, 0.0], 1),  # it would not, and this one has three quarters
        (1, [0.5, 0.1, 0.0, 0.0], 2),
        (4, [0.0, 0.0, 1.0, 1.0], 4),  # nothing is wider
        (2, [0.0, math.nan, math.nan, 0.5], 3),
        (2, [], 1),  # nothing speaks against it
    ],
)
def test_the_window_moves_one_step_towards_the_share(level, accuracies, expected):
    windows = ladder(Window(low=0.4, high=0.6))
    assert next_level(windows, level, accuracies, share=0.5) == expected


@given(
    accuracies=st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0]), min_size=1),
    share=st.floats(0.05, 0.95),
    level=st.integers(0, 4),
)
def test_on_the_same_groups_the_window_comes_to_rest_at_the_narrowest_that_suffices(accuracies, share, level):
    windows = ladder(Window(low=0.4, high=0.6))
    for _ in range(2 * len(windows)):
        level = next_level(windows, level, accuracies, share)
    enough = [
        sum(window.judge(a) == "accepted" for a in accuracies) >= share * len(accuracies)
        for window in windows
    ]
    assert level == (enough.index(True) if True in enough else len(windows) - 1)
    assert next_level(windows, level, accuracies, share) == level
