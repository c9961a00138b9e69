"""Every shipped recipe is a valid configuration, and its launch script is valid bash."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_dapo.config import RunConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_RANKS = {"tiny": 2, "smollm2": 1, "qwen32b": 128, "qwen32b_async": 32}


@pytest.mark.parametrize("name", sorted(path.stem for path in (EXAMPLES / "configs").glob("*.yaml")))
def test_recipe_is_valid_and_can_be_overridden(name):
    config = RunConfig.load(EXAMPLES / "configs" / f"{name}.yaml", ["run.dir=elsewhere", "run.max_steps=3"])
    assert (config.run.dir, config.run.max_steps) == ("elsewhere", 3)
    assert name not in NUM_RANKS or config.layout.to_layout().world_size == NUM_RANKS[name]


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("run_*.sh")), ids=lambda path: path.name)
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
