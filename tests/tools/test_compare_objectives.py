"""What the comparison of objectives starts, and what it makes of what the runs have measured."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dapo.config import KINDS, RunConfig
from megatron_dapo.preflight import check_settings

SCRIPT = Path(__file__).parents[2] / "tools" / "compare_objectives.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_objectives", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def write_run(folder: Path, accuracies: list[float], norms: list[float]) -> Path:
    """A step for each norm, evaluated before the first and after each; of four groups one is all correct and
    one all wrong but for an answer without a grade.
    """
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"step": 0, "eval/accuracy": accuracies[0]}]
    for step, (accuracy, norm) in enumerate(zip(accuracies[1:], norms, strict=True), 1):
        rows.append(
            {
                "step": step,
                "update": step,
                "eval/accuracy": accuracy,
                "policy/loss": 0.0,
                "policy/grad_norm": norm,
                "policy/entropy": 1.0 / step,
                "policy/clip_low": 0.125,
                "policy/clip_high": 0.125 * step,
                "tokens/generated": 100,
                "time/step": 3.0,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    correct = [[True, True], [False, None], [True, False], [False, True]]
    facts = json.dumps({"groups": [{"correct": c} for c in correct]})
    (folder / "facts.jsonl").write_text(f"{facts}\n" * len(norms))
    return folder


def test_a_run_is_read(tool, tmp_path):
    run = tool.read_run(write_run(tmp_path / "run", [0.3, 0.7, 0.85], [1.0, 3.0]))
    assert run.accuracies == {0: 0.3, 1: 0.7, 2: 0.85}
    assert run.updates_to_good == 2
    assert (run.norms, run.entropy, run.useless) == ([1.0, 3.0], (1.0, 0.5), 0.5)
    assert (run.clipped, run.tokens, run.seconds) == (0.3125, 200, 6.0)


def test_a_row_of_the_table(tool, tmp_path):
    """Gradient norms 1, 3: variance 2, mean squared 4; and 2, 2."""
    runs = [
        tool.read_run(write_run(tmp_path / "a", [0.3, 0.7, 0.85], [1.0, 3.0])),
        tool.read_run(write_run(tmp_path / "b", [0.3, 0.8, 0.95], [2.0, 2.0])),
    ]
    cells = [cell.strip() for cell in tool.table({"grpo": runs}).splitlines()[-1].split("|")[1:-1]]
    accuracies, *others = cells[1:]
    assert cells[0] == "grpo" and accuracies == "0.900 (0.850 to 0.950)"
    assert others == ["1.5", "1", "0.25", "50%", "50%", "31.2%", "200", "3.0"]


def test_an_accuracy_that_was_never_reached_is_said(tool, tmp_path):
    run = tool.read_run(write_run(tmp_path / "a", [0.3, 0.4, 0.5], [1.0, 3.0]))
    assert "not reached" in tool.table({"dpo": [run]})


def test_the_picture(tool, tmp_path):
    run = tool.read_run(write_run(tmp_path / "a", [0.3, 0.4, 0.5], [1.0, 3.0]))
    tool.draw({"ppo": [run, run], "dapo": [run]}, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_every_objectives_run_is_a_valid_configuration(tool, tmp_path, monkeypatch):
    started: list[list[str]] = []

    def start(command: list[str], **_: Any) -> Any:
        started.append(command)
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(tool.subprocess, "run", start)
    options = argparse.Namespace(
        base=tmp_path, out=tmp_path / "out", steps=5, overrides=["optimizer.lr=1e-4"]
    )
    for kind in tool.objectives("all"):
        (tmp_path / "out" / f"{kind}-3").mkdir(parents=True)
        folder = tool.train(kind, 3, options)
        assert tool.train(kind, 3, options) == folder  # it has finished
        command = started.pop()
        assert not started
        config = RunConfig.load(command[3], command[4:])
        check_settings(config)
        assert (config.objective.kind, config.run.seed, config.run.max_steps) == (kind, 3, 5)
        assert config.optimizer.lr == 1e-4 and config.run.dir == str(folder)
    options.steps = 6
    tool.train("dapo", 3, options)
    assert len(started) == 1  # other arguments, another run


def test_all_objectives_are_those_of_the_configuration(tool):
    assert set(tool.objectives("all")) == set(KINDS)
    assert tool.objectives("dapo,gspo") == ["dapo", "gspo"]
    with pytest.raises(argparse.ArgumentTypeError, match="'ppo2' must be one of ppo, dpo"):
        tool.objectives("dapo,ppo2")


def test_a_run_that_fails_ends_the_comparison(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.subprocess, "run", lambda *_, **__: argparse.Namespace(returncode=2))
    options = argparse.Namespace(base=tmp_path, out=tmp_path / "out", steps=5, overrides=[])
    with pytest.raises(SystemExit, match="dpo with seed 0 ended with exit code 2"):
        tool.train("dpo", 0, options)
