"""Rewards that do not go together are refused; the edge of the rule is allowed."""

from __future__ import annotations

import re

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.preflight import check_settings

EACH = "objective.normalize_rewards=each"
TWO = "reward.rules={exact: 0.5}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([EACH], "objective.normalize_rewards=each normalises each of several rewards, and reward.verifier"),
        ([EACH], "is the only one; add reward.rules or reward.overlong_cache, or set normalize_rewards=sum"),
        (
            [EACH, TWO, "objective.reward_weights={exat: 2.0}"],
            "objective.reward_weights={'exat': 2.0} has a weight of exat, and the rewards are verifier, "
            "exact; correct",
        ),
        (
            [EACH, TWO, "objective.reward_weights={overlong: 2.0}"],  # there is none without overlong_cache
            "has a weight of overlong",
        ),
    ],
)
def test_one_reward_is_not_normalised_on_its_own(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_settings(RunConfig.load(None, ["model.path=m", *overrides]))


@pytest.mark.parametrize(
    "overrides",
    [
        [EACH, TWO],
        [EACH, "reward.overlong_cache=16"],
        [EACH, TWO, "reward.overlong_cache=16", "objective.reward_weights={overlong: 2.0, exact: 1.0}"],
        ["objective.kind=ppo"],
        ["objective.kind=dpo"],
    ],
)
def test_several_rewards_are(overrides):
    check_settings(RunConfig.load(None, ["model.path=m", *overrides]))
