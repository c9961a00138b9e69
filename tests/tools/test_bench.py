"""The packing benchmark prints what its planning of a small file comes to."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "bench.py"


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    """bench(lengths, *arguments) -> what `bench.py packing` prints, parsed."""
    spec = importlib.util.spec_from_file_location("bench", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(lengths: list[int], *arguments: str) -> dict[str, float]:
        file = tmp_path / "lengths.json"
        file.write_text(json.dumps(lengths))
        monkeypatch.setattr(sys, "argv", ["bench.py", "packing", "--lengths", str(file), *arguments])
        module.main()
        return json.loads(capsys.readouterr().out)

    return run


def test_packing(bench):
    report = bench(
        [60, 60, 60], "--budget", "100", "--ranks", "1"
    )  # 180 tokens in two budgets at best, 60 in each of three
    assert 0 < report.pop("seconds") < 1
    assert report == {"imbalance": 1.0, "fill": 0.6, "num_micro_batches": 3, "padding": 0.0, "lower_bound": 2}


def test_padding_of_a_layout(bench):
    # 30 and 30 become 32 (multiples of 2 cp), 64 together, and 96 for shares of both context-parallel ranks
    # in multiples of 48
    report = bench(
        [30, 30], "--budget", "100", "--ranks", "1", "--cp", "2", "--tp", "3", "--fp8", "tensorwise"
    )
    assert report["padding"] == round(1 - 60 / 96, 5)


def test_imbalance_is_by_the_cost_of_qwen_32b(bench):
    # by tokens the last 500 would go to the 20000; by cost that one is the dearest before
    lengths = [20000, 10000, 10000, 10000, 9000, 500, 500, 500]
    report = bench(lengths, "--budget", "22528", "--ranks", "3")
    costs = [2 * 31.9842e9 * n + 655360 * n * n for n in lengths]
    assert report["imbalance"] == pytest.approx(costs[0] / (sum(costs) / 3), abs=1e-4)
    assert report["imbalance"] > 1.05 and report["fill"] == round(60500 / 67584, 5)


def test_a_budget_below_a_sample(bench):
    with pytest.raises(
        SystemExit, match=r"--budget 100 is below the longest sample \(101 tokens\); raise it"
    ):
        bench([101, 5], "--budget", "100")
