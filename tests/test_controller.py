"""What rank 0 decides reaches every rank: a result, a stop, a push of the weights in between, an error.
Without engines.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from support.samples import make_completion, make_group

from megatron_dapo.config import RewardConfig
from megatron_dapo.controller import Controller, on_rank_0
from megatron_dapo.errors import UserError
from megatron_dapo.policy.control import ControlChannel
from megatron_dapo.reward.overlong import LengthPenalty
from megatron_dapo.rollout.rollouts import StopRequested, WeightsNeeded
from megatron_dapo.types import Collected

CONTROLLER: Any = object()  # only handed on


def on_three_ranks(work: Callable[[Any], Any]) -> tuple[list[Any], list[int]]:
    """What `on_rank_0` returns or raises on each of three ranks (threads with one store), and how often each
    pushed.
    """
    store = dist.HashStore()
    channels = [ControlChannel(rank, store, beat_s=0.1, silence_s=5) for rank in range(3)]
    outcomes: list[Any] = [None] * 3
    pushes = [0] * 3

    def push(rank: int) -> None:
        pushes[rank] += 1

    def run(rank: int) -> None:
        controller = CONTROLLER if rank == 0 else None
        try:
            outcomes[rank] = on_rank_0(work, controller, channels[rank], push_weights=lambda: push(rank))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    channels[0].close()
    return outcomes, pushes


def test_the_result_of_rank_0_is_returned_on_every_rank():
    outcomes, pushes = on_three_ranks(lambda controller: ("batch", controller is CONTROLLER))
    assert outcomes == [("batch", True)] * 3 and pushes == [0, 0, 0]


def test_every_rank_pushes_whenever_engines_need_weights_and_the_work_goes_on():
    calls: list[int] = []

    def work(controller: Any) -> str:
        calls.append(len(calls))
        if len(calls) < 3:
            raise WeightsNeeded
        return "step"

    outcomes, pushes = on_three_ranks(work)
    assert outcomes == ["step"] * 3 and pushes == [2, 2, 2] and calls == [0, 1, 2]


def test_a_stop_is_raised_on_every_rank():
    def stop(controller: Any) -> None:
        raise StopRequested

    outcomes, _ = on_three_ranks(stop)
    assert [type(outcome) for outcome in outcomes] == [StopRequested] * 3


@pytest.mark.parametrize(
    "error", [UserError("sampling.max_prompts=4 is used up"), OSError("a fault of the code")]
)
def test_an_error_stays_what_it_is_on_rank_0_and_ends_the_others_with_one_sentence(error):
    def fail(controller: Any) -> None:
        raise error

    outcomes, _ = on_three_ranks(fail)
    assert outcomes[0] is error
    assert [str(outcome) for outcome in outcomes[1:]] == [
        "rank 0 has ended the run; its message says why"
    ] * 2
    assert all(isinstance(outcome, UserError) for outcome in outcomes[1:])


def test_the_strength_of_the_length_penalty_follows_what_is_collected_and_is_in_the_checkpoint():
    """By hand: from 1, half of the trained completions truncated, a target of 0.2."""
    cut, ended = make_completion(finish_reason="length"), make_completion()
    group = dataclasses.replace(make_group(correct=1, size=2), completions=(cut, ended))
    penalty = LengthPenalty(RewardConfig(overlong_cache=4, overlong_target=0.2), max_tokens=10)
    controller: Any = object.__new__(Controller)
    controller._counted_for = 3
    controller.grader = SimpleNamespace(length_penalty=penalty)
    collected = Collected(groups=(group,), sampled=(), counts={})
    controller.service = SimpleNamespace(next_step=lambda version: collected, state=lambda: {"slots": []})
    controller.reporter = SimpleNamespace(flush=lambda: None)
    assert controller.collect(3) is collected
    assert controller.state(3).rollouts == {"slots": [], "overlong_factor": 1 + (0.5 - 0.2)}
