"""Which objective a configuration's section gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.objectives import OBJECTIVES, make_objective
from megatron_dapo.objectives.base import trained_tokens
from megatron_dapo.types import Stream


def test_dapo_is_the_default_and_divides_by_trained_tokens():
    objective = make_objective(RunConfig.make({"model": {"path": "m"}}).objective)
    assert objective.needs == {Stream.OLD_LOGPROBS} and objective.denominator is trained_tokens


def test_a_registered_kind_is_made_from_its_own_section(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "toy", lambda section: ("toy", section.strength))
    assert make_objective(SimpleNamespace(kind="toy", strength=3)) == ("toy", 3)


def test_an_unknown_kind_is_refused_with_those_that_there_are():
    with pytest.raises(
        UserError, match=r"objective\.kind=ppo is not one of dapo; use one of them or register"
    ):
        make_objective(SimpleNamespace(kind="ppo"))
