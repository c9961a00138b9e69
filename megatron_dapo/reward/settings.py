"""What cannot be right about rewards, as small named rules; preflight.py includes all of them."""

from __future__ import annotations

from collections.abc import Callable

from megatron_dapo.config import RunConfig
from megatron_dapo.config.objective_base import GroupSection
from megatron_dapo.errors import UserError


def overlong_cache_is_part_of_the_response(config: RunConfig) -> None:
    """The penalty grows over the last tokens of the longest response."""
    if config.reward.overlong_cache > config.rollout.max_tokens:
        raise UserError(
            f"reward.overlong_cache={config.reward.overlong_cache} exceeds "
            f"rollout.max_tokens={config.rollout.max_tokens}; lower it"
        )


def a_factor_that_moves_has_a_penalty(config: RunConfig) -> None:
    """reward.overlong_target moves the strength of the overlong penalty from overlong_factor on."""
    reward = config.reward
    if reward.overlong_target is None:
        return
    if reward.overlong_cache == 0:
        raise UserError(
            f"reward.overlong_target={reward.overlong_target} moves the strength of a penalty that "
            "reward.overlong_cache=0 switches off; set overlong_cache"
        )
    if reward.overlong_factor > reward.overlong_factor_max:
        raise UserError(
            f"reward.overlong_factor={reward.overlong_factor} begins above "
            f"reward.overlong_factor_max={reward.overlong_factor_max}; lower it"
        )


def each_of_several_rewards_is_normalised(config: RunConfig) -> None:
    """objective.normalize_rewards=each has several rewards, and weights of these alone."""
    reward, objective = config.reward, config.objective
    if not isinstance(objective, GroupSection) or objective.normalize_rewards == "sum":
        return
    names = ["verifier", *reward.rules, *(["overlong"] if reward.overlong_cache else [])]
    if len(names) == 1:
        raise UserError(
            "objective.normalize_rewards=each normalises each of several rewards, and reward.verifier is the "
            "only one; add reward.rules or reward.overlong_cache, or set normalize_rewards=sum"
        )
    if unknown := sorted(objective.reward_weights.keys() - set(names)):
        raise UserError(
            f"objective.reward_weights={objective.reward_weights} has a weight of {', '.join(unknown)}, and "
            f"the rewards are {', '.join(names)}; correct the name"
        )


SETTINGS: tuple[Callable[[RunConfig], None], ...] = (
    overlong_cache_is_part_of_the_response,
    a_factor_that_moves_has_a_penalty,
    each_of_several_rewards_is_normalised,
)
