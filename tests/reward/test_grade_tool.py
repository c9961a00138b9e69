import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "grade.py"


def grade(tmp_path: Path, lines: list[str], *args: str) -> subprocess.CompletedProcess:
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, str(TOOL), str(tmp_path / "rows.jsonl"), "--workers", "1", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


ROWS = [
    json.dumps({"response": response, "answer": answer, "label": label, "source": source})
    for response, answer, label, source in [
        ("Answer: 7", 7, True, "a"),
        ("Answer: 8", "7", False, "a"),
        ("Answer: 8", "7", 1, "b"),
        ("Answer: 8", "degrees", -1, "b"),  # an answer of which nothing is left: error
    ]
]


def test_summary(tmp_path):
    result = grade(tmp_path, ROWS)
    assert json.loads(result.stdout) == {"rows": 4, "correct": 1, "timeouts": 0, "errors": 1}


def test_agreement_with_labels_in_all_and_by_source(tmp_path):
    result = grade(tmp_path, ROWS, "--label-key", "label", "--by", "source", "--disagreements", "5")
    summary = json.loads(result.stdout)
    assert (
        summary["agreement"],
        summary["source"]["a"]["agreement"],
        summary["source"]["b"]["agreement"],
    ) == (0.75, 1.0, 0.5)
    assert "line 3: graded False, label True" in result.stderr


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


def test_unknown_verifier_and_empty_file_are_refused(tmp_path):
    assert "reward.verifier='dappo'" in grade(tmp_path, ROWS, "--verifier", "dappo").stderr
    assert "has no rows" in grade(tmp_path, [""]).stderr
