"""`tools/export_quantized.py` as a command line, in the process of the test. What it writes is tested in
tests/convert.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from support.models import make_tiny_model
from support.samples import make_completion, make_group, make_prompt

from megatron_dapo.report.rollouts import rollout_path, save_groups
from megatron_dapo.types import Group

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("export_quantized")


@pytest.fixture
def tool(module, capsys):
    """tool(*arguments) -> (exit status, standard output, standard error)."""

    def run(*arguments: object):
        status = module.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "model"
    return make_tiny_model(folder, arch="llama", hidden=128, heads=4, kv_heads=4, ffn=128)


def group(position: int, *responses: list[int]) -> Group:
    completions = tuple(make_completion(tokens, number=i) for i, tokens in enumerate(responses))
    prompt = make_prompt(position, tokens=(1, 2, 3))
    graded = make_group(prompt, size=len(responses))
    return Group(prompt=prompt, completions=completions, correct=graded.correct, rewards=graded.rewards)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """Six rollouts of two steps, numbered by their first tokens."""
    save_groups(rollout_path(tmp_path, 1), [group(0, [10, 5], [11, 5, 6])], step=1, meta={})
    groups = [group(1, [12], [13, 7]), group(2, [14, 8], [15])]
    save_groups(rollout_path(tmp_path, 2), groups, step=2, meta={})
    return tmp_path


def test_rollouts_are_spread_over_all_files(module, run_dir):
    def firsts(*arguments) -> list[int]:
        return [rollout.tokens[3] for rollout in module.read_rollouts(*arguments)]

    folder, file = run_dir / "rollouts", rollout_path(run_dir, 2)
    assert firsts([folder], 100, 100) == [10, 11, 12, 13, 14, 15]
    assert firsts([folder], 4, 100) == [10, 11, 13, 14]  # of all six
    assert firsts([folder], 1, 100) == [10]
    assert firsts([file], 2, 100) == [12, 14]
    cut = module.read_rollouts([folder], 2, 5)
    assert [rollout.tokens for rollout in cut] == [(1, 2, 3, 10, 5), (1, 2, 3, 12)]
    assert {rollout.num_prompt_tokens for rollout in cut} == {3}


def test_text_and_json(tool, model, run_dir):
    arguments = ("--model", model, "--scheme", "fp8_block", "--calibrate", run_dir / "rollouts")
    status, out, err = tool(*arguments, "--out", run_dir / "a")
    lines = out.splitlines()
    assert status == 0 and "GB of memory" in err
    assert lines[0].split() == ["weight", "relative", "largest"]
    assert lines[1].startswith("model.layers.0.self_attn.q_proj.weight  0.0") and len(lines) == 1 + 14 + 2
    assert lines[-1].startswith("kl ") and lines[-1].endswith("nats a token, over 11 tokens of responses")
    told = json.loads(tool(*arguments, "--out", run_dir / "b", "--json")[1])
    assert told["scheme"] == "fp8_block" and told["kl_tokens"] == 11 and 0 < told["kl"] < 0.1
    assert f"{told['errors'][3]['relative']:.6f}" in lines[4] and told["bytes"] < told["bytes_bf16"]


def test_without_rollouts(tool, model, tmp_path):
    status, out, _ = tool("--model", model, "--scheme", "fp8_block", "--out", tmp_path / "out")
    assert status == 0 and "kl" not in out and (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--model", "/no/such", "--scheme", "fp8_block"), "--model '/no/such' is neither a folder"),
        (("--scheme", "fp8", "--calibrate", "{run}"), "holds no step_*.parquet"),
        (("--scheme", "fp8", "--calibrate", "{run}/rollouts/step_000009.parquet"), "no rollout file at"),
        (("--scheme", "fp8", "--calibrate", "{run}/rollouts", "--max-tokens", "3"), "within --max-tokens 3"),
        (("--scheme", "fp8"), "is calibrated on rollouts"),
        (("--scheme", "nvfp4_awq", "--calibrate", "{run}/rollouts"), "needs a GPU"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(tool, model, run_dir, arguments, match):
    given = [argument.format(run=run_dir) for argument in arguments]
    given = given if "--model" in given else ["--model", model, *given]
    status, out, err = tool(*given, "--out", run_dir / "out")
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert match in err and not (run_dir / "out").exists()


@pytest.mark.parametrize("arguments", [("--samples", "0"), ("--max-tokens", "-1"), ("--scheme", "fp6")])
def test_values_out_of_range_are_status_2(tool, model, tmp_path, arguments):
    with pytest.raises(SystemExit) as caught:
        tool("--model", model, "--scheme", "fp8", "--out", tmp_path / "out", *arguments)
    assert caught.value.code == 2
