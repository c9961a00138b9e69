"""Responses and rules that want to end the grading: every grade comes, in time, and is of what it is of."""

import json
import os
import time
from pathlib import Path

import pytest

from megatron_dapo.reward.jobs import Grade
from megatron_dapo.reward.pool import GradingPool

TEXTS = {
    "a million digits": "Answer: " + "7" * 1_000_000,
    "a million digits in a box": "\\boxed{" + "7" * 1_000_000 + "}",
    "nested braces": "\\boxed{" * 20_000 + "7" + "}" * 20_000,
    "nested fractions": "Answer: $" + "\\frac{1}{" * 2_000 + "7" + "}" * 2_000 + "$",
    "open braces": "\\boxed{" + "{" * 100_000,
    "brackets": "Answer: " + "(" * 50_000,
    "NUL bytes": "\x00Answer: \x00 7\x00",
    "lone surrogates": "\ud800Answer: \udfff 7",
    "dollars": "$" * 100_000,
    "spaces": "answer" + " " * 100_000,
    "a tower of powers": "Answer: $10^{10^{10^{10}}}$",
    "a factorial": "Answer: $(10^{10})!$",
    "line separators": "Answer: \u2028\u2029\x85 8",
    "right to left": "Answer: \u202e7",
    "nothing": "",
}
GRADED = ("correct", "wrong", "no_answer")
GOOD = Grade("correct", 1.0)

MODULE = """
import ctypes, os, re, signal, time
def rule(response, answer):
    if response == "exit": os._exit(0)
    if response == "segfault": ctypes.string_at(0)
    if response == "8 GiB": bytearray(8 << 30)
    if response == "bit by bit":
        kept = []
        while True: kept.append(bytearray(1 << 26))
    if response == "loop":
        while True: pass
    if response == "loop in C": re.match("(a+)+$", "a" * 60 + "b")
    if response == "swallows":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            try: time.sleep(1)
            except BaseException: pass
    if response == "recursion": return rule_again(response)
    if response == "closes": os.closerange(3, 100)
    return response == answer
def rule_again(response): return rule_again(response)
"""


@pytest.mark.parametrize("rule", ["dapo", "dapo_boxed", "exact", "auto"])
async def test_hostile_texts(rule):
    """What reads the end of a response is sure of each; math-verify may need too long, or too much."""
    with GradingPool(rule, workers=1, timeout_s=1.0) as pool:
        assert await pool.grade(["Answer: 7"], "7") == [GOOD]
        texts = list(TEXTS.values())
        start = time.monotonic()
        grades = await pool.grade([*texts, "Answer: 7"], "7")
        assert grades.pop() == GOOD
    outcomes = dict(zip(TEXTS, (grade.outcome for grade in grades), strict=True))
    allowed = (*GRADED, "timeout", "crashed") if rule == "auto" else GRADED
    assert set(outcomes.values()) <= set(allowed), outcomes
    right = {name for name, outcome in outcomes.items() if outcome == "correct"}
    assert right <= {"nested braces", "NUL bytes", "lone surrogates"}, outcomes  # they do say 7
    if rule != "auto":
        assert time.monotonic() - start < 20


async def test_hostile_rules(tmp_path, monkeypatch):
    (tmp_path / "hostile_rule.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    expected = {
        "exit": "crashed",
        "segfault": "crashed",
        "8 GiB": "crashed",
        "bit by bit": "crashed",
        "loop": "timeout",
        "loop in C": "timeout",
        "swallows": "timeout",
        "recursion": "crashed",
        "closes": "crashed",
        "7": "correct",
        "8": "wrong",
    }
    with GradingPool("hostile_rule:rule", workers=1, timeout_s=3.0, memory_bytes=1 << 28) as pool:
        responses = [text for name in expected for text in (name, "7")]
        grades = await pool.grade(responses, "7")
    assert dict(zip(responses[::2], (grade.outcome for grade in grades[::2]), strict=True)) == expected
    assert grades[1::2] == [GOOD] * len(expected)
    assert all(grade.correct is None for grade in grades if grade.outcome in ("timeout", "crashed"))


async def test_hostile_programs_are_wrong_and_cost_no_worker():
    answer = json.dumps({"inputs": ["1"], "outputs": ["7"]})
    programs = [
        "import os\nos._exit(0)",
        "import os\nos.kill(os.getppid(), 9)",
        "while True: pass",
        "print(7)",
    ]
    with GradingPool("code", workers=1, timeout_s=4.0) as pool:
        before = _workers()
        grades = await pool.grade([f"```python\n{program}\n```" for program in programs], answer)
        assert _workers() == before
    assert [grade.outcome for grade in grades] == ["wrong"] * 3 + ["correct"]


def _workers() -> list[str]:
    """Processes whose parent is this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = path.read_text().rpartition(")")[0::2]
        except OSError:
            continue
        if rest.split()[1] == str(os.getpid()):
            found.append(name)
    return sorted(found)
