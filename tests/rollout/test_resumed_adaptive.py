"""A run that is killed and resumed with everything on that follows what was sampled: a curriculum over two
sources, an adaptive window, an adaptive length penalty. What its steps train on and report is that of the run
that was not killed. The real rollouts, prompt stream and penalty on simulated engines.
"""

from __future__ import annotations

import asyncio
import pickle
import random
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.data.prompts import PromptStream
from megatron_dapo.data.rows import Row
from megatron_dapo.report.step import source_metrics, wasted_tokens
from megatron_dapo.reward.overlong import LengthPenalty
from megatron_dapo.rollout.rollouts import Rollouts, StopRequested
from megatron_dapo.rollout.simulate import Simulation
from megatron_dapo.rollout.simulate_clock import run_virtual
from megatron_dapo.rollout.simulate_model import Profile
from megatron_dapo.types import Collected, Completion, Group, Prompt, Timing

STEPS, LONGEST, UPDATE_S = 7, 60, 2.0
End = tuple[Literal["kill", "signal"], float]
SOURCES: dict[str | None, list[Row]] = {
    name: [Row(f"{name}{i}", "1") for i in range(size)] for name, size in (("large", 30), ("small", 8))
}


def make_config(max_age: int) -> RunConfig:
    return RunConfig.make(
        {
            "model": {"path": "none"},
            "rollout": {"max_tokens": LONGEST, "max_concurrency": 16, "seeded": True},
            "sampling": {
                "prompts_per_step": 6,
                "samples_per_prompt": 4,
                "max_age": max_age,
                "max_prompts": 16,
                "on_cap": "train_smaller_batch",
                "low": 0.4,
                "high": 0.6,
                "inclusive": True,
                "adaptive": True,
            },
            "reward": {"overlong_cache": 20, "overlong_target": 0.2, "overlong_gain": 2.0},
            "data": {
                "sources": [{"path": "large.jsonl", "weight": 2}, {"path": "small.jsonl"}],
                "skip_solved": 1,
                "pools": [{"up_to": 0.25, "weight": 0.5}, {"up_to": 1.0, "weight": 0.8}],
            },
        }
    )


class Prompts(PromptStream):
    """Prompts whose first token is their position, as simulated clients expect, and what sampling them
    gives.
    """

    pass_rates = (1.0,)  # nothing of the simulation's own report is looked at

    def __init__(self, config: RunConfig) -> None:
        tokenizer: Any = lambda text, **_: {"input_ids": [1]}  # noqa: E731
        lag = config.sampling.most_ahead
        super().__init__(SOURCES, tokenizer, config.data, config.run.seed, lag=lag)

    def next(self) -> Prompt | None:
        prompt = super().next()
        return prompt and replace(prompt, tokens=(prompt.position, 1))

    @staticmethod
    def outcome(position: int, version: int, n: int) -> tuple[list[int], list[bool]]:
        chance = random.Random(f"{position}/{version}")
        rate = chance.choice([0.0, 0.25, 0.5, 0.75, 1.0])
        right = [chance.random() < rate for _ in range(n)]
        return [chance.choice([5, 20, 45, LONGEST]) for _ in right], right


class Grading:
    """The verdict is the first token; the reward as Grader's."""

    def __init__(self, penalty: LengthPenalty) -> None:
        self._penalty = penalty

    async def grade(self, prompt: Prompt, completion: Completion) -> bool:
        return bool(completion.tokens[0])

    def group(self, prompt: Prompt, completions: Any, grades: Any, timing: Timing) -> Group:
        of = self._penalty.of
        rewards = tuple(2.0 * g - 1 + of(len(c.tokens)) for c, g in zip(completions, grades, strict=True))
        return Group(
            prompt=prompt,
            completions=tuple(completions),
            correct=tuple(grades),
            rewards=rewards,
            timing=timing,
        )


class Process(Simulation):
    """The controller's part of a run, from a checkpoint's state on, with a checkpoint after every push."""

    def __init__(self, max_age: int, checkpoint: bytes | None) -> None:
        config = make_config(max_age)
        profile = Profile(
            tokens_per_second={1: 20.0, 32: 200.0},
            kv_tokens=3000,
            prefill_tokens_per_second=1000.0,
            start_s=5.0,
            sync_s=1.0,
            train_tokens_per_second=500.0,
        )
        self.prompts = Prompts(config)
        super().__init__(config, profile, self.prompts, engines=2, steps=STEPS)  # type: ignore[arg-type]
        self.penalty = LengthPenalty(config.reward, LONGEST)
        self.rollouts = Rollouts(
            config,
            fleet=self.fleet,
            prompts=self.prompts,
            grading=Grading(self.penalty),
            clock=asyncio.get_event_loop().time,
        )
        self.first = 0
        if checkpoint:
            self.first, state, factor = pickle.loads(checkpoint)
            self.rollouts.load_state(state)
            self.penalty.load_state(factor)
        self.checkpoint, self.metrics = checkpoint, list[dict[str, Any]]()

    async def save(self, step: int) -> None:
        self.checkpoint = pickle.dumps((step, await self.rollouts.state(), self.penalty.factor))

    async def start(self) -> None:
        await self.rollouts.start()
        await self.rollouts.wait_ready()
        await self._push(self.first)

    async def make_steps(self, ends: dict[int, End]) -> None:
        """Until the last step or an end."""
        loop, this = asyncio.get_running_loop(), asyncio.current_task()
        assert this is not None
        for version in range(self.first, STEPS):
            if version in ends:
                how, seconds = ends.pop(version)
                loop.call_later(seconds, self.rollouts.interrupt if how == "signal" else this.cancel)
            collected = await self._collect(version)
            self.penalty.end_step(collected.groups)
            await asyncio.sleep(UPDATE_S)
            self.metrics.append(metrics_of(collected, self.prompts, self.penalty))
            await self._push(version + 1)
            await self.save(version + 1)


def metrics_of(collected: Collected, prompts: Prompts, penalty: LengthPenalty) -> dict[str, Any]:
    return {
        "trained": [(g.prompt.position, g.prompt.row, g.correct, g.rewards) for g in collected.groups],
        "window": collected.window,
        "counts": collected.counts,
        "wasted": wasted_tokens(collected),
        "factor": penalty.factor,
        **source_metrics(collected),
        **prompts.metrics(),
    }


def run(max_age: int, ends: dict[int, End]) -> list[dict[str, Any]]:
    """The metrics of all steps. ends: by step how the process ends that begins it first, and how many seconds
    later. 'kill': the newest checkpoint is what is left; 'signal': one is made of what there is.
    """

    async def process(checkpoint: bytes | None) -> Process:
        one = Process(max_age, checkpoint)
        await one.start()
        steps = asyncio.ensure_future(one.make_steps(ends))
        await asyncio.wait({steps})
        if not steps.cancelled() and isinstance(steps.exception(), StopRequested):
            await one.save(one.first + len(one.metrics))
        elif not steps.cancelled():
            steps.result()
        await one.rollouts.stop()
        return one

    metrics: list[dict[str, Any]] = []
    checkpoint: bytes | None = None
    while len(metrics) < STEPS:
        one, _ = run_virtual(partial(process, checkpoint))
        checkpoint = one.checkpoint
        saved = pickle.loads(checkpoint)[0] if checkpoint else 0
        metrics = (metrics[: one.first] + one.metrics)[:saved]
    return metrics


@pytest.fixture(scope="module", params=[0, 1])
def undisturbed(request) -> tuple[int, list[dict[str, Any]]]:
    return request.param, run(request.param, {})


def test_everything_moves_in_the_run_that_is_compared(undisturbed):
    _, metrics = undisturbed
    assert len({line["window"] for line in metrics}) >= 2
    assert len({line["factor"] for line in metrics}) >= 5
    last = metrics[-1]
    assert last["data/passed_over_solved"] > 0 and last["data/passed_over_pool"] > 0
    assert last["data/solved"] > 0 and any(line["counts"].get("carried_over") for line in metrics) == (
        undisturbed[0] > 0
    )


@pytest.mark.parametrize("how", ["kill", "signal"])
@pytest.mark.parametrize("seconds", [0.01, 1.0, 4.0, 9.0, 30.0])
def test_a_run_that_ended_in_every_step_and_was_resumed_is_the_run_that_went_on(undisturbed, how, seconds):
    max_age, expected = undisturbed
    ends = {step: (how, seconds) for step in range(STEPS - 1)}
    assert run(max_age, ends) == expected
    assert not ends


def test_a_state_that_is_forgotten_is_seen(undisturbed, monkeypatch):
    """The penalty's factor."""
    max_age, expected = undisturbed
    monkeypatch.setattr(LengthPenalty, "load_state", lambda self, factor: None)
    assert run(max_age, {2: ("kill", 1.0)}) != expected
