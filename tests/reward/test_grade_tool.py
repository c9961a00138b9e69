import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "grade.py"


def grade(tmp_path: Path, lines: list[str], *args: str, rule: str = "dapo") -> subprocess.CompletedProcess:
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, str(TOOL), "--input", str(tmp_path / "rows.jsonl"), "--workers", "1"]
    return subprocess.run(
        [*command, "--rule", rule, *args], capture_output=True, text=True, timeout=60, check=False
    )


ROWS = [
    json.dumps({"response": response, "answer": answer, "label": label, "source": source})
    for response, answer, label, source in [
        ("Answer: 7", 7, True, "a"),
        ("Answer: 8", "7", True, "a"),
        ("Answer: 8", "8", 0, "b"),
        ("Answer: 8", "degrees", -1, "b"),  # an answer of which nothing is left: no grade
    ]
]
COUNTS = {"rows": 4, "correct": 2, "wrong": 1, "no_answer": 0, "timeout": 0, "crashed": 1}


def test_summary(tmp_path):
    assert json.loads(grade(tmp_path, ROWS).stdout) == COUNTS


def test_agreement_with_labels_in_all_and_by_source(tmp_path):
    result = grade(tmp_path, ROWS, "--label-key", "label", "--by", "source", "--disagreements", "5")
    summary = json.loads(result.stdout)
    assert (summary["agreement"], summary["false_positives"], summary["false_negatives"]) == (0.5, 1, 1)
    a, b = summary["source"]["a"], summary["source"]["b"]
    assert (a["agreement"], a["false_negatives"], b["agreement"], b["false_positives"]) == (0.5, 1, 0.5, 1)
    assert "line 3: correct, label False" in result.stderr and "line 2: wrong, label True" in result.stderr


def test_what_is_added_to_the_rows(tmp_path):
    rows = [*ROWS, json.dumps({"prediction": "x=\n9", "answer": "9", "rule": "auto", "text": "\ud800"})]
    output = tmp_path / "graded.jsonl"
    assert grade(tmp_path, rows, "--output", str(output), "--rule-key", "rule").returncode == 0
    graded = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{**json.loads(row), **added} for row, added in zip(rows, graded, strict=True)] == graded
    names = ("correct", "score", "outcome", "extracted")
    assert [tuple(row[name] for name in names) for row in graded] == [
        (True, 1.0, "correct", "7"),
        (False, -1.0, "wrong", "8"),
        (True, 1.0, "correct", "8"),
        (None, None, "crashed", None),
        (True, 1.0, "correct", "x= 9"),
    ]


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_run_goes_on_where_its_output_ends(tmp_path, cut):
    """`cut`: bytes of the third line that a killed run had written."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "graded.jsonl"
    assert grade(tmp_path, ROWS, "--output", str(whole)).returncode == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    first = lines[0].replace(b'"extracted": "7"', b'"extracted": "kept"')  # would not be so if graded again
    output.write_bytes(first + lines[1] + lines[2][:cut])
    result = grade(tmp_path, ROWS, "--output", str(output))
    assert json.loads(result.stdout) == COUNTS, result.stderr
    assert output.read_bytes() == first + b"".join(lines[1:])
    assert (
        json.loads(grade(tmp_path, ROWS, "--output", str(output)).stdout) == COUNTS
    )  # nothing is left to do


def test_an_output_of_other_rows_is_not_gone_on_with(tmp_path):
    output = tmp_path / "graded.jsonl"
    assert grade(tmp_path, ROWS[1:], "--output", str(output)).returncode == 0
    result = grade(tmp_path, ROWS, "--output", str(output))
    assert result.returncode == 1 and "line 1 is not the grade of that row" in result.stderr
    assert "line 3 is not the grade" in grade(tmp_path, ROWS[1:3], "--output", str(output)).stderr


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("grade_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_a_prediction_is_what_each_rule_looks_for(module):
    from megatron_dapo.reward.rules import load_rule

    for rule in ("dapo", "dapo_boxed", "math_verify", "auto", "exact"):
        for prediction in ("7", "x^2", "\\frac{1}{2}"):
            response = module.as_response(prediction)
            assert load_rule(rule)(response, prediction, {}).decision == "correct", (rule, response)
    assert load_rule("choice")(module.as_response("B"), "B", {}).decision == "correct"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 5: not JSON"),
        ("[1]", "line 5: must be a JSON object"),
        ('{"answer": "7"}', "line 5: no key 'response'"),
        ('{"response": null, "answer": "7"}', "line 5: response=None must be text"),
        ('{"response": "7", "answer": "7", "label": "yes"}', "line 5: label='yes' must be true, false"),
    ],
)
def test_errors_name_the_line(tmp_path, line, message):
    result = grade(tmp_path, [*ROWS, line], "--label-key", "label")
    assert result.returncode == 1 and result.stdout == ""
    assert message in result.stderr and "Traceback" not in result.stderr


def test_unknown_rules_and_empty_files_are_refused(tmp_path):
    assert "reward.verifier='dappo'" in grade(tmp_path, ROWS, rule="dappo").stderr
    assert "has no rows" in grade(tmp_path, [""]).stderr
    named = json.dumps({"response": "7", "answer": "7", "rule": "dappo"})
    result = grade(tmp_path, [named], "--rule-key", "rule")
    assert result.returncode == 1 and "reward.verifier='dappo'" in result.stderr


def test_rules_see_the_whole_row_and_its_answer(module, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"response": "r", "a": 7, "level": 3}\n')
    arguments = ["--input", str(tmp_path / "rows.jsonl"), "--answer-key", "a"]
    [row] = module.read_rows(module.parse_args(arguments))
    assert row.seen() == {"response": "r", "a": 7, "level": 3, "answer": "7"}
