"""The packing benchmark prints what its planning of a small file comes to; what the command line refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dapo.reward.rules import load_rule

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def packing(bench, tmp_path):
    """packing(lengths, *arguments) -> what `bench.py packing` prints, parsed."""

    def run(lengths: list[int], *arguments: str) -> dict[str, float]:
        file = tmp_path / "lengths.json"
        file.write_text(json.dumps(lengths))
        return bench("packing", "--lengths", str(file), *arguments)

    return run


def test_packing(packing):
    report = packing(
        [60, 60, 60], "--budget", "100", "--ranks", "1"
    )  # 180 tokens in two budgets at best, 60 in each of three
    assert 0 < report.pop("seconds") < 1
    assert report == {"imbalance": 1.0, "fill": 0.6, "num_micro_batches": 3, "padding": 0.0, "lower_bound": 2}


def test_padding_of_a_layout(packing):
    # 30 and 30 become 32 (multiples of 2 cp), 64 together, and 96 for shares of both context-parallel ranks
    # in multiples of 48
    report = packing(
        [30, 30], "--budget", "100", "--ranks", "1", "--cp", "2", "--tp", "3", "--fp8", "tensorwise"
    )
    assert report["padding"] == round(1 - 60 / 96, 5)


def test_imbalance_is_by_the_cost_of_qwen_32b(packing):
    # by tokens the last 500 would go to the 20000; by cost that one is the dearest before
    lengths = [20000, 10000, 10000, 10000, 9000, 500, 500, 500]
    report = packing(lengths, "--budget", "22528", "--ranks", "3")
    costs = [2 * 31.9842e9 * n + 655360 * n * n for n in lengths]
    assert report["imbalance"] == pytest.approx(costs[0] / (sum(costs) / 3), abs=1e-4)
    assert report["imbalance"] > 1.05 and report["fill"] == round(60500 / 67584, 5)


def test_a_budget_below_a_sample(packing):
    with pytest.raises(
        SystemExit, match=r"--budget 100 is below the longest sample \(101 tokens\); raise it"
    ):
        packing([101, 5], "--budget", "100")


def test_ages_are_compared_at_equal_lengths_only(bench):
    with pytest.raises(SystemExit, match="--max-age compares steps of equal lengths; leave --lengths out"):
        bench("step", "--max-age", "1", "--lengths", "geometric")


def test_a_grading_worker_loads_the_verifier_without_the_benchmarks(bench):
    rule = load_rule("bench:even_length")
    decisions = [rule(response, "?", {}).decision for response in ("ab", "ac")]  # 97 + 98, 97 + 99
    assert decisions == ["wrong", "correct"]
    code = "import sys, bench; print('torch' in sys.modules, 'benchmarks' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(TOOLS)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.stdout.split() == ["False", "False"], done.stderr
