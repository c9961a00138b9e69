"""A rollout service of fake engines, driven as the trainer drives it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.errors import RequestFailed
from megatron_dapo.rollout.rollouts import Rollouts, WeightsNeeded
from megatron_dapo.rollout.sample import EvaluationSampling
from megatron_dapo.rollout.service import RolloutService
from megatron_dapo.types import Completion, Group, Prompt, Timing
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

    def record(self, prompt: Prompt, accuracy: float) -> None: ...

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Grading:
    """Every second completion is right, none of a prompt in `wrong`. A completion of a prompt in `held` gets
    no grade.
    """

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.wrong: set[int] = set()
        self.graded: list[tuple[int, int]] = []  # (position, number of the completion)

    async def grade(self, prompt: Prompt, completion: Completion) -> bool:
        while prompt.position in self.held:
            await asyncio.sleep(0)
        self.graded.append((prompt.position, completion.number))
        return completion.number % 2 == 0 and prompt.position not in self.wrong

    def group(
        self, prompt: Prompt, completions: Sequence[Completion], grades: Sequence[bool], timing: Timing
    ) -> Group:
        rewards = tuple(1.0 if grade else -1.0 for grade in grades)
        return Group(
            prompt=prompt,
            completions=tuple(completions),
            correct=tuple(grades),
            rewards=rewards,
            timing=timing,
        )


def make_config(
    run_dir: object, *, seeded: bool = True, inflight_updates: bool = True, **sampling: Any
) -> RunConfig:
    """3 prompts a step with 2 samples each, strict unless said otherwise."""
    options = {"prompts_per_step": 3, "samples_per_prompt": 2, "max_age": 0} | sampling
    return RunConfig.make(
        {
            "model": {"path": "model"},
            "data": {"path": "data"},
            "run": {"dir": str(run_dir)},
            "sampling": options,
            "rollout": {"seeded": seeded, "inflight_updates": inflight_updates},
        }
    )


class Service(RolloutService):
    """A service of fake engines, with the fleet at hand."""

    def __init__(
        self,
        engines: Engines,
        tmp_path: Path,
        watch: Callable[..., None] = lambda *how: None,
        **options: Any,
    ) -> None:
        self.engines, self.grading = engines, Grading()
        super().__init__(
            make_config(tmp_path, **options),
            folder=Path("model"),
            stop_token_ids=(1,),
            prompts=Stream(),
            grading=self.grading,
            watch=watch,
            fleet=engines.fleet,
        )

    def push(self, version: int) -> list[str]:
        """What sync/publish.py does, without weights; the names that committed."""

        async def push_to(name: str, client: FakeClient) -> None:
            await client.start_weight_update()
            await client.finish_weight_update(str(version))

        with self.paused() as replicas:
            names = replicas.push_targets()
            errors = replicas.begin_call(names, push_to)()
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


class Core(Rollouts):
    """Rollouts of fake engines, inside the test's own event loop; `async with` starts and stops them."""

    def __init__(self, engines: Engines, *, max_age: int = 1, seeded: bool = False, **options: Any) -> None:
        self.engines, self.grading, self.stream = engines, Grading(), Stream()
        config = make_config("runs/fake", max_age=max_age, seeded=seeded, **options)
        super().__init__(config, fleet=engines.fleet, prompts=self.stream, grading=self.grading)

    async def __aenter__(self) -> Core:
        await self.start()
        await self.wait_ready()
        await self.push(0)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()
        assert not any(server.is_running for server in self.engines.servers)

    async def push(self, version: int, fails: Mapping[str, Exception] | None = None) -> None:
        """What sync/publish.py does, without weights. `fails`: engines that fail in it."""

        async def push_to(name: str, client: Any) -> None:
            await client.start_weight_update()
            await client.finish_weight_update(str(version))

        await self.pause()
        for name in await self.fleet.push_targets():
            if fails and name in fails:
                self.fleet.set_failed(name, "a push", fails[name])
                continue
            errors = await self.fleet.call([name], push_to)
            assert errors == {name: None}
            self.fleet.set_ready(name, version)
        await self.resume()

    async def restarted(self, engines: Engines) -> Core:
        """The rollouts of another process that goes on from this one's state, on other engines."""
        sampling = self._config.sampling
        core = Core(
            engines,
            max_age=sampling.max_age,
            seeded=self._config.rollout.seeded,
            inflight_updates=self._config.rollout.inflight_updates,
        )
        core.load_state(await self.state())
        return core


def engines_with(
    num: int = 1, *, held: set[int] | None = None, rollout: dict | None = None, **client
) -> Engines:
    """Engines whose clients have these attributes; responses are 3 tokens long."""

    def prepare(made: FakeClient) -> None:
        made.delay = lambda prompt: 3
        made.held = held if held is not None else set()
        for name, value in client.items():
            setattr(made, name, value)

    return Engines(num=num, prepare=prepare, rollout=rollout or {})


async def step(core: Core, version: int) -> list[Group]:
    async with asyncio.timeout(5):
        collected = await core.next_step(version)
    return list(collected.groups)


def runs_of(group: Group) -> set:
    return {completion.versions for completion in group.completions}
