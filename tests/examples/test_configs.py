"""Every shipped recipe is a valid configuration, and its launch script is valid bash."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.models import make_tiny_model

from megatron_dapo import preflight
from megatron_dapo.config import RunConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_RANKS = {"tiny": 2, "smollm2": 1, "recommended_small": 1, "qwen32b": 128, "qwen32b_async": 32} | {
    "qwen7b_1node": 8,
    "qwen3_30b_a3b": 32,
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (EXAMPLES / "configs").glob("*.yaml")))
def test_recipe_is_valid_and_can_be_overridden(name):
    config = RunConfig.load(EXAMPLES / "configs" / f"{name}.yaml", ["run.dir=elsewhere", "run.max_steps=3"])
    assert (config.run.dir, config.run.max_steps) == ("elsewhere", 3)
    assert name not in NUM_RANKS or config.layout.to_layout().world_size == NUM_RANKS[name]


def test_the_recommended_small_recipe_has_the_recommended_values_and_passes_preflight(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}))
    model = make_tiny_model(tmp_path / "model", max_positions=5120)
    config = RunConfig.load(
        EXAMPLES / "configs" / "recommended_small.yaml",
        [f"model.path={model}", f"data.path={data}", "run.device=cuda", f"run.dir={tmp_path / 'run'}"],
    )
    preflight.check(config, planned=True)
    sampling, objective = config.sampling, config.objective
    assert (config.optimizer.lr, sampling.prompts_per_step, config.rollout.max_tokens) == (1e-6, 32, 4096)
    assert (objective.eps_low, objective.eps_high, objective.lambda_lm) == (0.2, 0.2, 0.5)
    assert sampling.bounds == (0.3, 0.7) and sampling.inclusive
    assert config.reward.overlong_factor == 0.1 and config.reward.overlong_cache > 0


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("run_*.sh")), ids=lambda path: path.name)
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
