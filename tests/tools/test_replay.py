"""What tools/replay.py refuses before any rank starts; that it replays the same numbers is in invariance/."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from support.models import make_tiny_model
from support.samples import make_group, make_prompt

from megatron_dapo.config import RunConfig
from megatron_dapo.report.rollouts import rollout_path, save_groups

TOOL = Path(__file__).parents[2] / "tools" / "replay.py"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run folder with the rollouts of step 1 and without the data that they came from. The model has
    3 layers, 4 heads and 2 key/value heads.
    """
    folder = tmp_path_factory.mktemp("run")
    make_tiny_model(folder / "model", layers=3)
    sizes = ["sampling.prompts_per_step=2", "sampling.samples_per_prompt=4", "batch.max_tokens=64"]
    lengths = ["data.max_prompt_tokens=16", "rollout.max_tokens=32", "data.path=gone.jsonl"]
    paths = [f"model.path={folder / 'model'}", f"run.dir={folder}"]
    config = RunConfig.load(None, [*paths, *sizes, *lengths, "model.dtype=fp32", "run.device=cpu"])
    (folder / "config.yaml").write_text(config.dump())
    save_groups(rollout_path(folder, 1), [make_group(make_prompt(i)) for i in range(2)], 1, {})
    return folder


@pytest.fixture
def replay(monkeypatch, run_dir):
    """Call the command line; returns its exit code and with what ranks were started."""
    spec = importlib.util.spec_from_file_location("replay", TOOL)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.delenv("RANK", raising=False)
    started: list[Any] = []
    monkeypatch.setattr(tool, "start_ranks", lambda config, arguments: started.append(config) or 0)

    def call(*arguments: str, step: str = "1") -> tuple[int, list[Any]]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--run", str(run_dir), "--step", step, *arguments])
        return tool.main(), started

    return call


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["layout.pipeline_parallel=2"],
            "error: layout.pipeline_parallel=2 (x virtual 1) does not divide the model's 3 layers; "
            "use one of [1, 3] stages",
        ),
        (
            ["layout.tensor_parallel=4"],
            "error: layout.tensor_parallel=4 does not divide the model's 2 key/value heads; "
            "use one of [1, 2]",
        ),
        (["optimizer.decay=cosine"], "error: optimizer.decay=cosine needs optimizer.decay_updates"),
        (["optimizer.lr=[1"], "error: cannot read override 'optimizer.lr=[1'"),
    ],
)
def test_what_the_policy_cannot_represent_is_one_line_and_nothing_starts(replay, capsys, overrides, words):
    code, started = replay(*overrides)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith(words) and error.count("\n") == 1 and started == []


def test_a_step_without_rollouts_is_one_line(replay, capsys):
    code, started = replay(step="7")
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and started == []


def test_a_layout_that_the_model_splits_over_starts_without_the_data(replay):
    code, (config,) = replay("layout.pipeline_parallel=3", "layout.tensor_parallel=2")
    assert code == 0 and config.layout.to_layout().world_size == 6
