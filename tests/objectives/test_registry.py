"""Which objective a configuration's section gives."""

from __future__ import annotations

from typing import Literal

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.config.objective import DapoConfig, ObjectiveSection
from megatron_dapo.errors import UserError
from megatron_dapo.objectives import OBJECTIVES, make_objective
from megatron_dapo.objectives.base import trained_tokens
from megatron_dapo.types import Stream


def test_dapo_is_the_default_and_divides_by_trained_tokens():
    objective = make_objective(RunConfig.make({"model": {"path": "m"}}).objective)
    assert objective.needs == {Stream.OLD_LOGPROBS} and objective.denominator is trained_tokens


class Toy(ObjectiveSection):
    kind: Literal["toy", "other"] = "toy"
    strength: int = 3


def test_a_registered_kind_is_made_from_its_own_section(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "toy", lambda section: ("toy", section.strength))
    assert make_objective(Toy()) == ("toy", 3)


def test_an_unknown_kind_is_refused_with_those_that_there_are():
    with pytest.raises(
        UserError, match=r"objective\.kind=other is not one of cispo, dapo, .*; use one of them or register"
    ):
        make_objective(Toy(kind="other"))


@pytest.mark.parametrize(
    ("written", "max_age", "used"),
    [
        ("auto", 0, "none"),
        ("auto", 1, "truncate"),
        ("auto", 3, "truncate"),
        ("none", 1, "none"),
        ("mask", 0, "mask"),
    ],
)
def test_groups_of_older_weights_are_corrected_unless_it_is_switched_off(monkeypatch, written, max_age, used):
    """What is written stays written; the objective sees what it means."""
    monkeypatch.setitem(OBJECTIVES, "dapo", lambda section: section)
    section = DapoConfig(mismatch_correction=written)
    seen = make_objective(section, max_age=max_age)
    assert seen.mismatch_correction == used and section.mismatch_correction == written
    assert (seen.mismatch_level, seen.mismatch_high) == ("token", 2.0)


def test_auto_is_what_stands_where_nothing_is_written():
    assert RunConfig.make({"model": {"path": "m"}}).objective.mismatch_correction == "auto"
