"""Simulated runs that write what a real run writes about itself, with engines of known numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.simulate import Simulation
from megatron_dapo.rollout.simulate_model import Profile
from megatron_dapo.rollout.simulate_prompts import Difficulty, PlannedStream
from megatron_dapo.types import Collected, GroupFacts

A, B = 0.004, 0.0005  # seconds of a decoding step, and more for each sequence


def make_config(**sections: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"path": "none"},
        "rollout": {"max_tokens": 300, "max_concurrency": 64},
        "sampling": {"prompts_per_step": 12, "samples_per_prompt": 8, "max_age": 0},
    }
    return RunConfig.make({name: values.get(name, {}) | sections.get(name, {}) for name in values})


def make_profile(**values: Any) -> Profile:
    defaults: dict[str, Any] = {
        "tokens_per_second": {n: n / (A + B * n) for n in (1, 2, 4, 8, 16, 32, 48, 64)},
        "kv_tokens": 1e9,
        "prefill_tokens_per_second": 20_000.0,
        "start_s": 5.0,
        "sync_s": 0.25,
        "train_tokens_per_second": 9000.0,
        "train_s": 0.75,
        "rollout_s": 0.03,
        "request_s": 0.02,
        "prompt_tokens": 40,
    }
    return Profile(**(defaults | values))


DIFFICULTIES = [
    Difficulty(pass_rate=rate, median_tokens=tokens, sigma=0.8, wrong_longer=1.5)
    for rate, tokens in ((0.2, 90), (0.0, 60), (0.7, 40), (0.9, 20))
]


class Recorded(Simulation):
    """A simulation that keeps what a run writes about itself."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.collected: list[Collected] = []

    async def _collect(self, version: int) -> Collected:
        self.collected.append(await super()._collect(version))
        return self.collected[-1]

    def write(self, file: Path) -> None:
        """facts.jsonl, on a clock that began long ago."""
        zero = 5000.0 + self._zero
        phases = [(name, begin + zero, end + zero) for name, begin, end in self.timeline.phases]
        lines = []
        for step, collected in enumerate(self.collected):
            named = zip(("rollout", "update", "sync"), phases[3 * step : 3 * step + 3], strict=True)
            tokens = sum(len(c.tokens) for group in collected.groups for c in group.completions)
            prompts = sum(len(group.completions) for group in collected.groups) * self.profile.prompt_tokens
            lines.append(
                {
                    "step": step + 1,
                    "began": phases[3 * step][1],
                    "phases": [[name, begin, end] for name, (_, begin, end) in named],
                    "trained_tokens": tokens,
                    "prompt_tokens_trained": prompts,
                    "groups": [as_json(group, 5000.0) for group in collected.sampled],
                }
            )
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def as_json(group: GroupFacts, zero: float) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(group, name) for name in GroupFacts.__slots__}
    t = group.timing
    values["timing"] = t and [t.engine, t.sent + zero, t.answered + zero, t.graded + zero]
    return values


def record(folder: Path, config: RunConfig, profile: Profile, *, steps: int = 6, engines: int = 2) -> dict:
    longest, prompt = config.rollout.max_tokens, profile.prompt_tokens
    stream = PlannedStream(DIFFICULTIES, seed=3, max_tokens=longest, prompt_tokens=prompt)
    run = Recorded(config, profile, stream, engines=engines, steps=steps)
    result = run.simulate()
    run.write(folder / "facts.jsonl")
    return result
