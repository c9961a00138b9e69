"""The learning curve shows what metrics.jsonl holds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "plot.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("plot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path) -> Path:
    """Four steps; the evaluation is recorded before the first and after the last, as a run does."""
    rows = [{"step": 0, "eval/accuracy": 0.25}]
    rows += [
        {"step": s, "accuracy/mean": 0.2 * s, "reward/mean": 0.4 * s - 1, "lr": 1e-4} for s in (1, 2, 3, 4)
    ]
    rows[-1]["eval/accuracy"] = 0.9375
    folder = tmp_path / "some_run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_curves(tool, run):
    curves = tool.read_curves(run / "metrics.jsonl")
    assert curves["eval/accuracy"] == ([0, 4], [0.25, 0.9375])
    assert curves["accuracy/mean"] == ([1, 2, 3, 4], pytest.approx([0.2, 0.4, 0.6, 0.8]))
    assert curves["reward/mean"] == ([1, 2, 3, 4], pytest.approx([-0.6, -0.2, 0.2, 0.6]))
    assert set(curves) == {"eval/accuracy", "accuracy/mean", "reward/mean"}


def test_picture_holds_every_curve(tool, run, tmp_path, capsys):
    import matplotlib.image

    out = tmp_path / "docs" / "curve.png"
    assert tool.main([str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "eval/accuracy: 0.250 at step 0, 0.938 at step 4" in printed
    assert [path.name for path in out.parent.iterdir()] == ["curve.png"]
    pixels = matplotlib.image.imread(out)[:, :, :3]
    for _, colour, _ in (tool.ACCURACIES | tool.REWARD).values():
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - rgb).max(axis=2) < 0.01).sum() > 100, f"no line of colour {colour}"


def test_only_an_evaluation_is_enough(tool, run):
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.5}\n')
    assert tool.main([str(run)]) == 0
    assert (run / "learning_curve.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no .*metrics.jsonl; give the folder of a run"),
        ("", "holds none of eval/accuracy"),
        ('{"step": 1, "lr": 0.1}\n', "holds none of"),
        ('{"step": 1, "accuracy/mean": 0.5}\n{"accuracy/mean"', "line 2: not a JSON object with a step"),
        ("[1]\n", "line 1: not a JSON object"),
    ],
)
def test_bad_metrics_are_explained(tool, run, content, message, capsys):
    import re

    if content is None:
        (run / "metrics.jsonl").unlink()
    else:
        (run / "metrics.jsonl").write_text(content)
    assert tool.main([str(run)]) == 2
    assert re.search(message, capsys.readouterr().err)
