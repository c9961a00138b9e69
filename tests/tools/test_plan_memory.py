"""`tools/plan.py memory` and `layouts`: what they print for the shipped configurations, and refuse."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
PHASES = {"generate", "old_logprobs", "update", "sync"}


@pytest.fixture
def tool(monkeypatch, tmp_path, capsys):
    """tool(*arguments) -> (exit status, standard output, standard error), in an empty folder."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    plan = importlib.import_module("plan")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object):
        status = plan.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("config", ["qwen32b", "qwen32b_async", "qwen7b_1node", "qwen3_30b_a3b"])
def test_the_memory_of_a_shipped_configuration(tool, config):
    status, out, _ = tool("memory", "--config", CONFIGS / f"{config}.yaml", "--json", "--formulas")
    result = json.loads(out)
    assert status == 0 and result["fits"] and result["margin_gib"] > 0
    assert result["peak_gib_by_phase"].keys() == result["parts_by_phase"].keys() == PHASES
    for phase, parts in result["parts_by_phase"].items():
        assert sum(parts.values()) == pytest.approx(result["peak_gib_by_phase"][phase])
    assert max(result["peak_gib_by_phase"].values()) + result["margin_gib"] == pytest.approx(
        result["gpu_gib"]
    )
    assert sum(rank["ranks"] for rank in result["by_rank"]) == result["ranks"]
    moments = result["timeline"]
    assert [moment["phase"] for moment in moments] == list(result["peak_gib_by_phase"])
    assert moments[-1]["start_s"] + moments[-1]["seconds"] == pytest.approx(result["seconds"]["step"])
    for moment in moments:
        assert moment["gib"] == pytest.approx(result["peak_gib_by_phase"][moment["phase"]])
    for rank, sizes in zip(result["by_rank"], result["one_update_gib_by_stage"].values(), strict=False):
        assert max(sizes) == pytest.approx(rank["gib_by_phase"]["update"])
    assert result["left_out"] == []


def test_the_flagship_is_built_on_meta_tensors():
    """In a process of its own: the CPU backend changes torch for good."""
    command = [
        sys.executable,
        ROOT / "tools" / "plan.py",
        "memory",
        "--config",
        CONFIGS / "qwen32b.yaml",
        "--json",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["ranks"], result["distinct_ranks"]) == (128, 4)
    assert "meta" in result["parameters_counted"]
    # 16 of 64 layers on 8 ranks: qkv 5120 x 7168 and its bias, proj 5120 x 5120, MLP 3 x 5120 x 27648; norms
    layer = (5120 * 7168 + 7168 + 5120 * 5120 + 3 * 5120 * 27_648) // 8 + 2 * 5120
    vocabulary = 152_064 * 5120 // 8
    counts = [rank["parameters"] for rank in result["by_rank"]]
    assert counts == [16 * layer + vocabulary, 16 * layer, 16 * layer, 16 * layer + vocabulary + 5120]
    first = result["by_rank"][0]
    sizes = [first[f"{name}_gib"] * 2**30 / counts[0] for name in ("weights", "gradients", "optimizer")]
    assert sizes == pytest.approx([2, 4, 12 / 4], rel=1e-4)
    for rank in result["by_rank"]:  # 22,528 tokens forward and backward on meta tensors
        kept = rank["one_micro_batch"]
        assert kept["autograd_gib"] == pytest.approx(kept["local_table_gib"], rel=0.001)
        assert kept["te_table_gib"] == pytest.approx(10.23, abs=0.25)  # the last stage has its head too


def test_text_and_picture(tool, tmp_path):
    out_file = tmp_path / "memory.png"
    arguments = ["--config", CONFIGS / "qwen7b_1node.yaml", "--formulas", "--plot", out_file]
    status, out, _ = tool("memory", *arguments, "--gpu", "H200")
    assert status == 0 and "139.8 GiB" in out and "planned, not measured" in out and "fits: " in out
    assert out_file.read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_what_does_not_fit_is_said(tool):
    arguments = ["--config", CONFIGS / "qwen7b_1node.yaml", "--formulas", "rollout.memory_utilization=0.95"]
    _, out, _ = tool("memory", *arguments)
    assert "DOES NOT FIT: -" in out


def test_layouts(tool, tmp_path):
    lengths = ["rollout.max_tokens=8192", "batch.updates_per_step=8", "sampling.prompts_per_step=128"]
    profile = tmp_path / "speed.json"
    arguments = ["--model", "Qwen/Qwen2.5-7B", "--gpus", 8, "--best", 3, "--engine-speed", profile, *lengths]
    status, out, _ = tool("layouts", *arguments, "--json")
    result = json.loads(out)
    assert status == 0 and len(result["layouts"]) == 3 < result["fitting"]
    assert {"step_seconds", "overrides", "margin_gib", "peak_gib_by_phase"} <= result["layouts"][0].keys()
    assert result["rejected"]["an update does not fit"]["lacks_gib"] > 0
    assert "each" not in result["rejected"]["an update does not fit"]
    assert json.loads(profile.read_text())["colocated"] is True
    _, out, _ = tool("layouts", *arguments)
    assert "combinations fit" in out and "rejected, an update does not fit" in out


def test_every_rejected_layout_has_a_reason(tool):
    arguments = ["--model", "Qwen/Qwen2.5-7B", "--gpus", 8, "rollout.max_tokens=8192", "--all"]
    _, out, _ = tool("layouts", *arguments, "--json")
    for why in json.loads(out)["rejected"].values():
        assert len(why["each"]) == why["count"] and all(one["what"] for one in why["each"])
        lacks = [one["lacks_gib"] for one in why["each"] if "lacks_gib" in one]
        assert not lacks or min(lacks) == why["lacks_gib"]
    _, out, _ = tool("layouts", *arguments)
    assert "\n    tp1 x pp1 x cp8 x dp1" in out or "\n    tp8 x pp1" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layouts", "--gpus", 8], "layouts needs --model or --config"),
        (["layouts", "--model", "x", "--gpus", 0], "--gpus 0 must be at least 1"),
        (["memory", "--config", CONFIGS / "tiny.yaml", "--plot", "x.pdf"], "--plot x.pdf must end in .png"),
        (["memory", "--config", CONFIGS / "tiny.yaml", "--gpu", "A100"], "invalid choice: 'A100'"),
    ],
)
def test_wrong_arguments_are_refused(tool, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tool(*arguments)
    assert message in capsys.readouterr().err


def test_a_model_that_nothing_is_known_of(tool):
    status, _, err = tool("layouts", "--model", "some/other", "--gpus", 8)
    assert status == 2 and "none is kept for other" in err
