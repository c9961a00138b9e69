"""A reader sees prompts, responses, verdicts and rewards of a step as text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support.models import make_tokenizer
from support.samples import make_completion, make_prompt

from megatron_dapo.config import RunConfig
from megatron_dapo.report.rollouts import rollout_path, save_groups
from megatron_dapo.types import Group

SCRIPT = Path(__file__).parents[2] / "tools" / "show_rollouts.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("show_rollouts", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Steps 3 and 4, prompts 7 and 8 each, two responses to a prompt."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    config = RunConfig.load(None, [f"model.path={folder / 'model'}", f"run.dir={folder}"])
    (folder / "config.yaml").write_text(config.dump())

    def completion(text: str, number: int, **changed):
        tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        return make_completion(tokens, version=2, number=number, **changed)

    for step in (3, 4):
        groups = [
            Group(
                prompt=make_prompt(
                    position,
                    text=f"What is {position}+1?",
                    answer=str(position + 1),
                    **({"rule": "exact", "source": "sums"} if position == 8 else {}),
                ),
                completions=(
                    completion(
                        f"step {step} says {position + 1}",
                        0,
                        reward_parts={"verifier": 1.25, "brief": -0.25} if position == 8 else {},
                    ),
                    completion("so " * 300 + "no", 1, finish_reason="length", versions=((1, 3), (2, 900))),
                ),
                correct=(True, False),
                rewards=(1.0, -1.25),
            )
            for position in (7, 8)
        ]
        save_groups(rollout_path(folder, step), groups, step, {})
    return folder


def test_the_newest_step_is_shown_with_long_texts_cut(tool, run_dir, capsys):
    assert tool.main([str(run_dir)]) == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert first == "step 4: 2 prompts, sampled by weights 1, 2"
    assert lines[:4] == [
        "=== prompt 7 (row 7): 1 of 2 right, answer 8",
        "What is 7+1?",
        "--- response 0: right, reward +1.000, 14 tokens, ended, weights 2",
        "step 4 says 8<|eos|>",
    ]
    assert lines[4] == (
        "--- response 1: wrong, reward -1.250, 903 tokens, cut at the longest length, "
        "weights 1 (3 tokens) then 2 (900 tokens)"
    )
    assert lines[5].startswith("so so ") and lines[5].endswith("so no<|eos|>")
    assert "[... 509 characters ...]" in lines[5]  # 3 x 300 + 2 + 7 characters, 400 shown
    assert lines[7] == "=== prompt 8 (row 8 of sums): 1 of 2 right by exact, answer 9"
    assert lines[9].startswith("--- response 0: right, reward +1.000 (verifier +1.250, brief -0.250), 14 ")


def test_a_prompt_is_shown_whole(tool, run_dir, capsys):
    assert tool.main([str(run_dir), "--step", "3", "--prompt", "8"]) == 0
    text = capsys.readouterr().out
    assert "prompt 7" not in text and "step 3 says 9" in text and "so " * 300 + "no" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "9"], "step 4 has no prompt 9; it has 7, 8"),
        (["--step", "5"], "no rollout file at"),
    ],
)
def test_what_is_not_there_is_one_line(tool, run_dir, capsys, arguments, words):
    assert tool.main([str(run_dir), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_a_run_without_rollouts_is_one_line(tool, run_dir, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert tool.main([str(tmp_path)]) == 2
    assert "report.rollouts=true" in capsys.readouterr().err
