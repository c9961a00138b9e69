"""`tools/convert_checkpoint.py` as a command line, in the process of the test, and once under torchrun."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.convert_runs import assert_bit_equal, weights

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch, capsys):
    """tool(*arguments) -> (exit status, standard output, standard error)."""
    monkeypatch.syspath_prepend(str(TOOLS))
    module = importlib.import_module("convert_checkpoint")

    def run(*arguments: object):
        status = module.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def test_there_and_back(tool, small_llama, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    status, out, err = tool("hf-to-megatron", "--hf", small_llama, "--out", there)
    assert status == 0 and "GB/s" in err
    assert out.startswith(f"{there}: 1 files, ") and out.endswith(" GB of weights\n")
    arguments = ("--megatron", there, "--hf-source", small_llama, "--out", back)
    assert tool("megatron-to-hf", *arguments)[0] == 0
    assert_bit_equal(weights(back), weights(small_llama))
    assert tool("verify", there, small_llama)[:2] == (0, "21 of 21 tensors are equal in every bit\n")
    status, out, _ = tool("inspect", there)
    assert status == 0 and "Megatron torch_dist" in out and "LlamaForCausalLM" in out
    facts = json.loads(tool("inspect", back, "--json")[1])
    assert facts["parameters"] == sum(tensor.numel() for tensor in weights(small_llama).values())


def test_what_differs_is_status_1(tool, small_llama, tmp_path):
    tool("hf-to-megatron", "--hf", small_llama, "--out", tmp_path / "bf16", "--dtype", "bf16")
    status, out, _ = tool("verify", tmp_path / "bf16", small_llama, "--json")
    found = json.loads(out)
    assert status == 1 and not found["equal"] and len(found["different"]) == found["tensors"] == 21
    assert all(0 <= row["largest"] < 0.01 for row in found["different"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "/no/such"),
        ("verify", "/no/such", "/no/such"),
        ("hf-to-megatron", "--hf", "/no/such", "--out", "{out}"),
        ("megatron-to-hf", "--megatron", "/no/such", "--hf-source", "{model}", "--out", "{out}"),
        ("hf-to-megatron", "--hf", "{model}", "--out", "{model}"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(tool, small_llama, tmp_path, arguments):
    names = {"out": tmp_path / "out", "model": small_llama}
    status, out, err = tool(*(argument.format(**names) for argument in arguments))
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("arguments", [("--workers", "0"), ("--shard-bytes", "0"), ("--dtype", "fp8")])
def test_values_out_of_range_are_status_2(tool, small_llama, tmp_path, arguments):
    with pytest.raises(SystemExit) as caught:
        tool("hf-to-megatron", "--hf", small_llama, "--out", tmp_path / "out", *arguments)
    assert caught.value.code == 2


@pytest.mark.slow
def test_ranks_of_torchrun(small_llama, tmp_path):
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(TOOLS / "convert_checkpoint.py"), "hf-to-megatron", "--hf", str(small_llama)]
    env = {**os.environ, "PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(out), "--shard-bytes", "6000"],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 1: " in done.stderr and f"{out}: " in done.stdout and done.stdout.count("files") == 1
