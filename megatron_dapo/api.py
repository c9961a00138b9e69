"""The Python API: the same run as `python -m megatron_dapo.train`, from a script or notebook."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig


class DAPOTrainer:
    """Train a model with DAPO. The run's processes are started by `train`; this process only waits for them.

    `model_name` is a Hugging Face folder or hub name ("Qwen2.5-32B" is the Qwen organisation's),
    `clip_epsilon` the lower clip range, `dynamic_sampling` the filter, `max_length` the longest response in
    tokens. Overlong responses are penalised over the last fifth of it, as in the paper. Anything else is an
    override "section.key": value, applied last, e.g. `overrides={"layout.data_parallel": 2, "run.dir":
    "runs/mine"}`; `{"reward.overlong_cache": 0}` switches that penalty off. UserError (a ValueError) for a
    wrong key or value, and for values that do not go together.
    """

    def __init__(
        self,
        model_name: str,
        *,
        clip_epsilon: float = 0.2,
        clip_epsilon_high: float = 0.28,
        dynamic_sampling: bool = True,
        max_length: int = 4096,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self._values: dict[str, Any] = {
            "model.path": model_name,
            "objective.eps_low": clip_epsilon,
            "objective.eps_high": clip_epsilon_high,
            "sampling.dynamic": dynamic_sampling,
            "rollout.max_tokens": max_length,
            **(overrides or {}),
        }
        self.config = self._resolve({})

    def train(
        self, dataset: str | os.PathLike[str] | Iterable[Mapping[str, Any]], epochs: int | None = None
    ) -> Path:
        """Run to the end and return the run folder (metrics.jsonl, checkpoints/, hf/).

        `dataset` is a JSONL or Parquet path, a list of {"prompt", "answer"} dicts or a `datasets.Dataset`.
        With `epochs` the run ends after that many passes over it, without it (or before) after run.max_steps.
        UserError for what preflight.py refuses, RuntimeError when the run failed.
        """
        from megatron_dapo.train import launch

        values: dict[str, Any] = {}
        if epochs is not None:
            values["data.epochs"] = epochs
            if "run.max_steps" not in self._values:
                values["run.max_steps"] = 1_000_000
        if isinstance(dataset, (str, os.PathLike)):
            values["data.path"] = os.fspath(dataset)
        else:
            file = Path(self.config.run.dir) / "data.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in dataset))
            values["data.path"] = str(file)
        self.config = self._resolve(values)
        if launch(self.config) != 0:
            raise RuntimeError(f"the run in {self.config.run.dir} failed; its output above says why")
        return Path(self.config.run.dir)

    def _resolve(self, values: Mapping[str, Any]) -> RunConfig:
        from megatron_dapo import preflight

        tree: dict[str, Any] = {}
        for key, value in {**self._values, **values}.items():
            *sections, name = key.split(".")
            inner = tree
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[name] = value
        # A budget that holds the longest sample, and the paper's share of it (4096 of 20480) for the penalty,
        # unless others were asked for.
        longest, data = tree["rollout"]["max_tokens"], tree.get("data", {})
        longest_sample = longest + data.get("max_prompt_tokens", 2048)
        tree.setdefault("batch", {}).setdefault("max_tokens", max(16384, longest_sample))
        tree.setdefault("reward", {}).setdefault("overlong_cache", longest // 5)
        config = RunConfig.make(tree)
        preflight.check_settings(config)
        return config
