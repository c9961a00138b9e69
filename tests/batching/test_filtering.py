"""Which accuracies are informative."""

from __future__ import annotations

import math

import pytest

from megatron_dapo.batching.filtering import Window, widened

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
