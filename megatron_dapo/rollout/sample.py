"""One group: sample the completions of a prompt, grade each as it ends. And the seeds of repeatable runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_dapo.types import Completion, Group, Partial, Prompt, Timing

Generate = Callable[..., Awaitable[list[Completion]]]  # Fleet.generate
SEEDS_OF_A_PROMPT = 1 << 12  # sample i of a prompt has its prompt's seed + i
# Added to a held-out problem's seed. Training's seeds are all below 2^60. Half of SEEDS_OF_A_PROMPT keeps the
# two apart where only 32 bits of a seed count, as in torch's CPU generator (up to 2,048 samples of a prompt).
EVALUATION_SEEDS = (1 << 60) + SEEDS_OF_A_PROMPT // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSampling:
    """How held-out problems are sampled: n of each, temperature (0 is greedy), nucleus (1 is off)."""

    n: int
    temperature: float
    top_p: float


class Grading(Protocol):
    """How completions become a graded group (reward/grading.py, or a fake)."""

    def grade(self, prompt: Prompt, completion: Completion) -> Awaitable[Any]:
        """The grade of one completion; asked for as soon as it has ended."""
        ...

    def group(
        self, prompt: Prompt, completions: Sequence[Completion], grades: Sequence[Any], timing: Timing
    ) -> Group:
        """The group of all completions of a prompt, with their grades in the same order."""
        ...


@dataclass(slots=True)
class _Attempt:
    """The completions of one group so far, and the grades that are being made of them.

    A request that fails is made again in full: `begins` forgets what the attempt before had brought.
    """

    prompt: Prompt
    grading: Grading
    clock: Callable[[], float]
    engine: str = ""
    sent: float = 0.0
    grades: dict[int, tuple[Completion, asyncio.Future[Any]]] = field(default_factory=dict)  # by number

    def begins(self, engine: str) -> None:
        self.give_up()
        self.engine, self.sent = engine, self.clock()

    def arrived(self, completion: Completion) -> None:
        if completion.number in self.grades:
            self.grades[completion.number][1].cancel()
        grade = asyncio.ensure_future(self.grading.grade(self.prompt, completion))
        self.grades[completion.number] = completion, grade

    async def finish(self, completions: Sequence[Completion]) -> Group:
        answered = self.clock()
        for completion in completions:
            known = self.grades.get(completion.number)
            if known is None or known[0] is not completion:
                self.arrived(completion)
        grades = [await self.grades[completion.number][1] for completion in completions]
        timing = Timing(engine=self.engine, sent=self.sent, answered=answered, graded=self.clock())
        return self.grading.group(self.prompt, completions, grades, timing)

    def give_up(self) -> None:
        """Cancel the grades that are still being made."""
        for _, grade in self.grades.values():
            grade.cancel()
        self.grades.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSampler:
    """Samples and grades groups. `options` are further arguments of every `generate` call; `clock` counts the
    seconds of Group.timing.

    answered: the completions of training prompts, by position, whose grades are being waited for.
    """

    generate: Generate
    grading: Grading
    run_seed: int
    seeded: bool
    options: dict[str, Any]
    clock: Callable[[], float] = time.monotonic
    answered: dict[int, Sequence[Completion]] = field(default_factory=dict)

    async def to_train(
        self, prompt: Prompt, *, n: int, temperature: float, began: Sequence[Partial] = ()
    ) -> Group:
        """A group of the training stream; `began`: the beginnings of its n responses, to go on from.

        No top-p or top-k: log-probabilities of a truncated distribution would not be the policy's.
        """
        options = {"n": n, "temperature": temperature, "top_p": 1.0, "key": prompt.position, "began": began}
        try:
            return await self._sample(prompt, training_seed, **options)
        finally:
            self.answered.pop(prompt.position, None)

    async def to_evaluate(self, prompt: Prompt, sampling: EvaluationSampling) -> Group:
        n, temperature, top_p = sampling.n, sampling.temperature, sampling.top_p
        return await self._sample(prompt, evaluation_seed, n=n, temperature=temperature, top_p=top_p)

    async def _sample(
        self, prompt: Prompt, seed: Callable[[int, int, int], int], key: int | None = None, **sampling: Any
    ) -> Group:
        def seed_of(version: int) -> int | None:
            return seed(self.run_seed, version, prompt.position) if self.seeded else None

        attempt = _Attempt(prompt, self.grading, self.clock)
        try:
            completions = await self.generate(
                prompt.tokens,
                seed_of=seed_of,
                key=key,
                begins=attempt.begins,
                arrived=attempt.arrived,
                **sampling,
                **self.options,
            )
            if key is not None:
                self.answered[key] = completions
            return await attempt.finish(completions)
        finally:
            attempt.give_up()


def training_seed(run_seed: int, version: int, position: int) -> int:
    """Seed of a prompt's first completion, below 2^60: seeds of other prompts, versions and samples never
    meet it.
    """
    number = (run_seed * 1_000_003 + version) * 1_000_003 + position
    return number % (1 << 48) * SEEDS_OF_A_PROMPT


def evaluation_seed(run_seed: int, version: int, position: int) -> int:
    """The same for a held-out problem: no training prompt has it, at equal position and version either."""
    return EVALUATION_SEEDS + training_seed(run_seed, version, position)
