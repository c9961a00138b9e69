"""What the sections of the objectives accept, and what their defaults are."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.config.objective import KINDS
from megatron_dapo.errors import UserError
from megatron_dapo.objectives import OBJECTIVES

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def load(*items: str):
    return RunConfig.load(None, ["model.path=m", *(f"objective.{item}" for item in items)]).objective


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (
            ["kl_coef=0.1", "kl_estimator=k1"],
            "configuration: objective.kl_estimator=k1 in the loss has a gradient of zero on average; use k2",
        ),
        (
            ["kl_coef=0.1", "kl_in=reward"],
            "objective.kl_estimator=k3 in the reward does not lead to the KL; use k1, or kl_in=loss",
        ),
        (
            ["covariance_low=5"],
            "objective.covariance_low=5.0 must be below covariance_high=5.0; change either",
        ),
        (
            ["normalize_rewards=each", "advantage=batch_std"],
            "objective.advantage=batch_std does not go with normalize_rewards=each",
        ),
        (["reward_weights={a: 1}"], "objective.reward_weights={'a': 1.0} are for normalize_rewards=each"),
        (
            ["mismatch_correction=second_moment", "mismatch_level=sequence"],
            "objective.mismatch_level=sequence does not go with mismatch_correction=second_moment",
        ),
        (["kind=sapo", "eps_low=0.1"], "unknown key objective.eps_low of objective.kind=sapo"),
        (["kind=cispo", "dual_clip=3"], "unknown key objective.dual_clip of objective.kind=cispo"),
        (["eps_high=.nan"], "objective.eps_high=nan: Input should be greater than 0"),
        (["aggregation=mean"], "objective.aggregation='mean': Input should be 'token_mean', 'sequence_mean'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_one_line(items, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(*items)
    assert "\n" not in str(caught.value)


def test_a_clip_from_below_alone_survives_the_file(tmp_path):
    config = RunConfig.load(None, ["model.path=m", "objective.eps_high=.inf"])
    (tmp_path / "config.yaml").write_text(config.dump())
    assert RunConfig.load(tmp_path / "config.yaml") == config and config.objective.eps_high == math.inf


def test_every_kind_has_a_section_an_objective_and_a_row_of_the_page():
    assert KINDS.keys() == OBJECTIVES.keys()
    rows = re.findall(r"^\| `(\w+)` \| \[[\d.]+\]\(https://arxiv", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows)) and set(rows) >= KINDS.keys() - {"ppo", "dpo"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("ppo", "dpo")])
def test_the_page_has_the_defaults_of_the_sections(kind):
    (row,) = re.findall(rf"^\| `{kind}` \|.*$", PAGE.read_text(), re.MULTILINE)
    section = KINDS[kind]()  # type: ignore[call-arg]
    assert f"| `{section.advantage}` | `{section.aggregation}` |" in row
