"""README.md of an exported model: what it was trained from and how, and what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_dapo.config import RunConfig
from megatron_dapo.weights.hf import with_owner

# sections without paths of the machine
SECTIONS = ("objective", "sampling", "reward", "batch", "optimizer", "layout")
RESULTS = {
    "eval/accuracy": "held-out accuracy",
    "accuracy/mean": "accuracy in training",
    "reward/mean": "reward",
    "response/length_mean": "response length, tokens",
}


def model_card(config: RunConfig, step: int, metrics: Path) -> str:
    """Markdown with the metadata that the Hugging Face hub reads. `metrics`: the run's metrics.jsonl, which
    may be missing; lines up to `step` count.
    """
    base = hub_name(config.model.path)
    settings = {
        "rollout": {"temperature": config.rollout.temperature, "max_tokens": config.rollout.max_tokens},
        **config.model_dump(mode="json", include=set(SECTIONS)),
    }
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"base_model: {base}"] if base else []
    head += ["tags:", "- reinforcement-learning", f"- {config.objective.kind}", "---"]
    return "\n".join(
        [
            *head,
            "",
            f"# {base or 'A model'} after {step} steps of {config.objective.kind.upper()}",
            "",
            f"Trained with megatron_dapo for {step} steps of {config.sampling.prompts_per_step} prompts x "
            f"{config.sampling.samples_per_prompt} responses. Weights are in {config.model.dtype}.",
            "",
            *_results(_read(metrics, step)),
            "## Configuration",
            "",
            "```yaml",
            OmegaConf.to_yaml(OmegaConf.create(settings)).rstrip(),
            "```",
            "",
        ]
    )


def hub_name(path: str) -> str | None:
    """`owner/name` if the model came from the hub, not from a folder."""
    name = with_owner(path)
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(path).exists() else None


def _read(metrics: Path, step: int) -> list[dict[str, Any]]:
    if not metrics.is_file():
        return []
    lines = (json.loads(line) for line in metrics.read_text().splitlines())
    return [line for line in lines if line["step"] <= step]


def _results(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the first and the last value of each."""
    rows = []
    for key, name in RESULTS.items():
        known = [line for line in lines if line.get(key) is not None]
        if known:
            ends = (f"{line[key]:.4g} (step {line['step']})" for line in (known[0], known[-1]))
            rows.append(f"| {name} | {' | '.join(ends)} |")
    if not rows:
        return []
    return ["## Results", "", "| | first | last |", "|---|---|---|", *rows, ""]
