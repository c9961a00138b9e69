"""The mapping of hub rows to {prompt, answer}, on an in-memory data set of DAPO-Math-17k's shape."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import datasets
import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.data.rows import Row, load_rows

SCRIPT = Path(__file__).parents[2] / "tools" / "download_data.py"
CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("download_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_rows(*pairs: tuple[str, str]) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": p}], "reward_model": {"ground_truth": a, "style": "rule"}}
            for p, a in pairs
        ]
    )


ROWS = (("1+1?", "2"), ("½ of 4?", "2"), ("1+1?", "2"))
DAPO = ("prompt.0.content", "reward_model.ground_truth")


@pytest.mark.parametrize(("dedup", "expected"), [(False, ROWS), (True, ROWS[:2])])
def test_what_is_written_is_what_a_run_reads(tool, tmp_path, monkeypatch, capsys, dedup, expected):
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or make_rows(*ROWS)
    )
    out = tmp_path / "new" / "rows.jsonl"
    paths = ["--prompt-path", DAPO[0], "--answer-path", DAPO[1]]
    monkeypatch.setattr(sys, "argv", ["x", "--name", "a/b", "--out", str(out), *paths, *["--dedup"] * dedup])
    tool.main()
    assert asked == [(("a/b", None), {"split": "train"})]
    assert load_rows(out, "prompt", "answer") == [Row(*pair) for pair in expected]
    assert f"{len(expected)} of 3 rows" in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("question", r"no 'question' in \['prompt', 'reward_model'\]"),
        ("prompt.1.content", "no '1' in a list"),
        ("prompt.content", "no 'content' in a list"),
        ("prompt.0.content.x", "no 'x' in a str"),
    ],
)
def test_a_wrong_path_is_named(tool, path, message):
    with pytest.raises(ValueError, match=f"path '{path}' has {message}"):
        list(tool.map_rows(make_rows(*ROWS), path, DAPO[1], False))


@pytest.mark.parametrize("recipe", ["qwen32b", "qwen32b_async"])
def test_the_instruction_is_in_the_prompt_once(tool, tmp_path, recipe):
    """The rows of the hub carry it, the recipe's template adds it: the prompt is the hub's again."""
    template = RunConfig.load(CONFIGS / f"{recipe}.yaml", []).data.template
    hub = template.replace("{prompt}", "How many\n\nprimes?")
    out = tmp_path / "rows.jsonl"
    tool.write(make_rows((hub, "2"), (hub + "\n", "2"), ("1+1?", "2")), *DAPO, True, out)
    rows = load_rows(out, "prompt", "answer")
    assert rows == [Row("How many\n\nprimes?", "2"), Row("1+1?", "2")]
    assert template.replace("{prompt}", rows[0].prompt) == hub


@pytest.mark.parametrize(
    ("prompt", "template", "expected"),
    [
        ("Q: 1+1 A:", "Q: {prompt} A:", "1+1"),
        ("Q: 1+1", "Q: {prompt} A:", "Q: 1+1"),  # the end is missing
        ("Q: A:", "Q: {prompt} A:", "Q: A:"),  # nothing would be left
        (" 1+1 ", "{prompt}", "1+1"),
        ("Please add: 1+1", "Please add: {prompt}", "1+1"),
        ([{"content": "x"}], "{prompt}", [{"content": "x"}]),
    ],
)
def test_a_template_is_taken_off_whole_or_not_at_all(tool, prompt, template, expected):
    assert tool.bare(prompt, template) == expected


@pytest.mark.parametrize("dedup", [False, True])
def test_rows_that_a_run_would_refuse_are_refused_here(tool, tmp_path, dedup):
    out = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="row 0: 'prompt' must be text"):
        tool.write(make_rows(*ROWS), "prompt", DAPO[1], dedup, out)
    with pytest.raises(ValueError, match="row 1: 'answer' is empty"):
        tool.write(make_rows(ROWS[0], ("a", "")), *DAPO, dedup, out)
    assert not out.exists()
