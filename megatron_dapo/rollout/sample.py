"""One group: sample the completions of a prompt, then grade them. And the seeds of repeatable runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from megatron_dapo.types import Completion, Group, Prompt

Generate = Callable[..., Awaitable[list[Completion]]]  # Fleet.generate
Grade = Callable[[Prompt, list[Completion]], Awaitable[Group]]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSampler:
    """Samples and grades groups. `options` are further arguments of every `generate` call."""

    generate: Generate
    grade: Grade
    run_seed: int
    seeded: bool
    options: dict[str, Any]

    async def to_train(self, prompt: Prompt, *, n: int, temperature: float) -> Group:
        """A group of the training stream.

        No top-p or top-k: log-probabilities of a truncated distribution would not be the policy's.
        """
        return await self._sample(prompt, training_seed, n=n, temperature=temperature, top_p=1.0)

    async def to_evaluate(self, prompt: Prompt, sampling: EvaluationSampling) -> Group:
        n, temperature, top_p = sampling.n, sampling.temperature, sampling.top_p
        return await self._sample(prompt, evaluation_seed, n=n, temperature=temperature, top_p=top_p)

    async def _sample(self, prompt: Prompt, seed: Callable[[int, int, int], int], **sampling: Any) -> Group:
        def seed_of(version: int) -> int | None:
            return seed(self.run_seed, version, prompt.position) if self.seeded else None

        completions = await self.generate(prompt.tokens, seed_of=seed_of, **sampling, **self.options)
        return await self.grade(prompt, completions)


def training_seed(run_seed: int, version: int, position: int) -> int:
    """Seed of a prompt's first completion, below 2^60: seeds of other prompts, versions and samples never
    meet it.
    """
    number = (run_seed * 1_000_003 + version) * 1_000_003 + position
    return number % (1 << 48) * SEEDS_OF_A_PROMPT


def evaluation_seed(run_seed: int, version: int, position: int) -> int:
    """The same for a held-out problem: no training prompt has it, at equal position and version either."""
    return EVALUATION_SEEDS + training_seed(run_seed, version, position)
