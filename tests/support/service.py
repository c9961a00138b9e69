"""A rollout service of fake engines, driven as the trainer drives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.client import RequestFailed
from megatron_dapo.rollout.sample import EvaluationSampling
from megatron_dapo.rollout.service import RolloutService, WeightsNeeded
from megatron_dapo.types import Completion, Group, Prompt
from support.engines import Engines, FakeClient
from support.samples import make_prompt

GREEDY = EvaluationSampling(n=1, temperature=0.0, top_p=1.0)


class Stream:
    """Prompts whose first token is their position, as the fake clients expect."""

    def __init__(self) -> None:
        self.position = 0

    def next(self) -> Prompt | None:
        self.position += 1
        return make_prompt(self.position - 1, tokens=(self.position - 1,))


async def grade(prompt: Prompt, completions: list[Completion]) -> Group:
    """Every second completion is right."""
    correct = tuple(i % 2 == 0 for i in range(len(completions)))
    rewards = tuple(1.0 if c else -1.0 for c in correct)
    return Group(prompt=prompt, completions=tuple(completions), correct=correct, rewards=rewards)


class Service(RolloutService):
    """A service of fake engines, with the fleet at hand."""

    def __init__(self, engines: Engines, tmp_path: Path, **sampling) -> None:
        options = {"prompts_per_step": 3, "samples_per_prompt": 2, "max_age": 0} | sampling
        config = RunConfig.make(
            {
                "model": {"path": "model"},
                "data": {"path": "data"},
                "run": {"dir": str(tmp_path)},
                "sampling": options,
                "rollout": {"seeded": True},
            }
        )
        self.engines = engines
        super().__init__(
            config,
            folder=Path("model"),
            stop_token_ids=(1,),
            prompts=Stream(),
            grade=grade,
            fleet=engines.fleet,
        )

    def push(self, version: int) -> list[str]:
        """What sync/publish.py does, without weights; the names that committed."""

        async def push_to(client: FakeClient) -> None:
            await client.start_weight_update()
            await client.finish_weight_update(str(version))
            await client.reset_prefix_cache()

        with self.paused() as replicas:
            names = replicas.push_targets()
            errors = replicas.call(names, push_to)
            for name in names:
                if (error := errors[name]) is None:
                    replicas.set_ready(name, version)
                else:
                    replicas.set_failed(name, "commit", error)
        assert not self.failed_pushes(errors), errors
        return [name for name in names if errors[name] is None]

    @staticmethod
    def failed_pushes(errors: dict) -> dict:
        return {name: error for name, error in errors.items() if isinstance(error, RequestFailed)}

    def until_it_answers(self, ask: Callable[[], object]) -> tuple[object, int]:
        """As the trainer: push when weights are needed. The answer, and the number of pushes."""
        for pushes in range(10):
            try:
                return ask(), pushes
            except WeightsNeeded:
                self.push(self.fleet.version or 0)
        raise AssertionError("it always needs weights")


def prompts(number: int) -> list[Prompt]:
    return [make_prompt(position, tokens=(position,)) for position in range(number)]


def positions(groups) -> list[int]:
    return [group.prompt.position for group in groups]


def started(engines: Engines) -> list[int]:
    """Every prompt that was sent, to any engine."""
    return sorted(p for clients in engines.clients.values() for client in clients for p in client.started)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)
