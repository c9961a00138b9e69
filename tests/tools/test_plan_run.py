"""`tools/plan.py run`: what a launch of the shipped configurations would be, and its refusals."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
SHARD_BYTES = 2 * 8_191_464_448  # bf16, a quarter of the 32B model


@pytest.fixture
def tool(monkeypatch, tmp_path, capsys):
    """tool(*arguments) -> (exit status, standard output, standard error), in an empty folder."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    plan = importlib.import_module("plan")
    monkeypatch.chdir(tmp_path)

    def run(config: str, *arguments: object):
        words = ["run", "--config", CONFIGS / f"{config}.yaml", *arguments]
        status = plan.main([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


def test_the_flagship(tool):
    status, out, _ = tool("qwen32b", "--nnodes", 16, "--gpus-per-node", 8, "--json")
    result = json.loads(out)
    assert status == 0 and (result["hosts"], result["ranks"], result["engines"]) == (16, 128, 32)
    assert result["memory"]["fits"] and result["memory"]["margin_gib"] > 5
    assert result["seconds"]["source"] == "estimate"
    assert result["seconds"]["step"] == pytest.approx(1160, rel=0.15)  # docs/simulator.md
    sizes = result["push"]["bytes"]
    assert sizes["total"] == 128 * SHARD_BYTES and result["push"]["ratio_bytes"] == 1.0
    assert sizes["between_hosts"] / sizes["total"] == pytest.approx(0.75, abs=0.01)  # as test_plan_tool.py
    assert result["push"]["seconds"]["push"] == pytest.approx(
        0.29, rel=0.1
    )  # of vLLM's tables: docs/bridge.md
    # 32.76 G parameters: bf16, fp32 masters and two moments; 2 that stay, 1 that is written, 1 export
    disk, parameters = result["disk_bytes"], 32_763_876_352
    assert disk == {
        "checkpoint": 14 * parameters,
        "export": 2 * parameters,
        "most": (3 * 14 + 2) * parameters,
    }


def test_the_flagship_in_words(tool):
    _, out, _ = tool("qwen32b")
    for text in ("128 ranks", "32 engines of tp4", "generate 70.", "update 202", "between hosts 1,572.8"):
        assert text in out
    assert "planned, not measured" in out and "(estimate)" in out and "a checkpoint 458.7" in out


def test_engines_on_hosts_of_their_own(tool):
    _, out, _ = tool("qwen32b_async", "--nnodes", 16, "--json")
    result = json.loads(out)
    assert (result["hosts"], result["ranks"], result["engines"]) == (16, 32, 24)
    assert result["push"]["bytes"]["between_hosts"] == 96 * SHARD_BYTES == result["push"]["bytes"]["total"]


def test_engines_in_block_fp8_are_sent_half(tool):
    _, out, _ = tool("qwen32b", "--json", "rollout.quantization=fp8_block")
    assert json.loads(out)["push"]["bytes"]["total"] / (128 * SHARD_BYTES) == pytest.approx(0.524, abs=0.001)


def test_on_a_cpu_no_gpus_memory_is_planned(tool):
    words = ["--nnodes", 2, "--gpus-per-node", 1, "run.device=cpu", "objective.kind=ppo", "--json"]
    status, out, _ = tool("tiny", *words)
    result = json.loads(out)
    assert status == 0 and result["memory"] is result["seconds"] is None
    assert (result["ranks"], result["engines"]) == (2, 2)
    _, text, _ = tool("tiny", *words[:-1])
    assert "not planned for run.device=cpu" in text
    _, out, _ = tool("tiny", *words[:-2], "--json")
    assert result["disk_bytes"]["checkpoint"] == 2 * json.loads(out)["disk_bytes"]["checkpoint"]


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ("qwen32b", ["--nnodes", 8], "128 ranks, but --nnodes 8 x --gpus-per-node 8 = 64 GPUs; change"),
        ("qwen32b_async", [], "how many hosts serve engines; give all of them as --nnodes"),
        ("qwen32b_async", ["--nnodes", 4], "32 ranks on 4 hosts, and --nnodes 4 leaves none for the engines"),
        ("qwen32b", ["policy.fp8.recipe=mxfp8"], "recipe=mxfp8 needs compute capability 10.0 or later"),
        ("qwen32b", ["model.path=some/other"], "none is kept for other"),
    ],
)
def test_what_cannot_be_launched_is_refused(tool, config, words, message):
    status, _, err = tool(config, *words)
    assert status == 2 and message in err
