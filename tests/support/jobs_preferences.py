"""What ranks do in the tests of training on preferences: whole runs of tools/train_dpo.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "train_dpo.py"


def train(runs: Sequence[Sequence[str]]) -> None:
    """One run after the other, each of its overrides."""
    from megatron_dapo.config import RunConfig
    from megatron_dapo.policy import session

    spec = importlib.util.spec_from_file_location("train_dpo", TOOL)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for overrides in runs:
        tool.train(RunConfig.load(None, overrides))
    session.stop()
