"""The grading benchmark prints rates and ratios; its responses are what it says they are."""

from __future__ import annotations

import re

import pytest


def test_rates_and_ratios(bench):
    report = bench("grade", "--groups", "10", "--repeats", "1")
    rates = report["answers_per_second"]
    assert rates.keys() == {"dapo", "auto", "math_verify"} and min(rates.values()) > 0
    ratio = rates["auto"] / rates["math_verify"]
    assert report["auto_over_math_verify"] == pytest.approx(ratio, rel=0.02, abs=0.01)


def test_four_of_five_answers_are_integers(bench):
    from benchmarks.grade import make_groups

    answers = [answer for _, answer in make_groups(100)]
    assert sum(bool(re.fullmatch("[0-9]+", answer)) for answer in answers) == 80
