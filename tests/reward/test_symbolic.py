"""math-verify as a rule, and integers that are judged without it exactly as it does."""

import random
import signal

import pytest

from megatron_dapo.reward.symbolic import MathVerify, integers_equal, math_verify, math_verify_correct


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Answer: 0.5", "\\frac{1}{2}"),
        ("so \\boxed{\\frac12}", "0.5"),
        ("so $x^2 + 2x + 1$", "(x+1)^2"),
        ("Answer: 1,234", "1234"),
        ("Answer: $18$", "\\$18"),
        ("\\boxed{\\{2, 1\\}}", "$\\{1, 2\\}$"),
    ],
)
def test_equal_values_are_accepted(response, answer):
    assert math_verify_correct(response, answer) is True


@pytest.mark.parametrize(
    ("response", "answer"), [("Answer: 0.51", "\\frac{1}{2}"), ("", "7"), ("no number", "7")]
)
def test_others_are_rejected(response, answer):
    assert math_verify_correct(response, answer) is False


def test_an_answer_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="cannot read the answer ''"):
        math_verify_correct("Answer: 7", "")


def test_the_alarm_signal_is_left_alone(monkeypatch):
    def forbidden(*_):
        raise AssertionError("signal.alarm was used")

    monkeypatch.setattr(signal, "alarm", forbidden)
    assert math_verify_correct("Answer: 1/2", "0.5")


@pytest.mark.parametrize(
    "name", ["math_verify.parser.parse_latex_cached", "math_verify.grader.sympy_expr_eq"]
)
def test_lack_of_memory_is_no_verdict(monkeypatch, name):
    """The library itself takes it for an expression that it cannot read, or for a difference."""

    def full(*_):
        raise MemoryError

    for own in ("parser.parse_latex_cached", "parser.parse_expr_cached", "grader.sympy_expr_eq"):
        module, _, function = own.partition(".")  # watched once more by the object of this test
        original = getattr(__import__(f"math_verify.{module}", fromlist=[function]), function)
        monkeypatch.setattr(f"math_verify.{own}", original)
    judge = MathVerify()
    judge._truth("\\frac{8}{3}")
    monkeypatch.setattr(name, judge._watched(full))
    with pytest.raises(MemoryError):
        judge.judge("so $\\boxed{\\frac{7}{3}}$", "\\frac{8}{3}")


# Text before the last answer that the library's order of preference could fall for.
BEFORE = (
    "Let $x = 3$.", "\\(y^2=4\\)", "\n\n", "$", "$$a=b$$", "\\[ z = 12 \\]", "costs $5 and", "3 + 4 = 7",
    "the answer is 12", "answer:", "ANSWER: 9\n", "\\boxed", "the final answer is 3", "5%", "[3, 4]",
    " [ 12 ] ", "**", "1,234", "\\frac{1}{2}", "\\$30", "= ", "$1$", "- ", "{", "}", "\\[", " \\(", "100",
)  # fmt: skip
ENDS = (
    "Answer: {}", "Answer: ${}$", "Answer:\n{}", "answer:  {}.", "So $\\boxed{{{}}}$.", "So \\boxed{{{}}}",
    "is \\(\\boxed{{{}}}\\).\n", "Answer: {}\n",
)  # fmt: skip


def test_integers_are_judged_as_by_the_library():
    draw = random.Random(7)
    known = 0
    for _ in range(150):
        answer = str(draw.choice([draw.randint(-20, 20), draw.randint(0, 10**12 - 1)]))
        said = answer if draw.random() < 0.3 else str(draw.randint(-20, 20))
        before = " ".join(draw.choice(BEFORE) for _ in range(draw.randint(0, 6)))
        response = before + draw.choice(["", " ", "\n"]) + draw.choice(ENDS).format(said)
        if (verdict := integers_equal(response, answer)) is not None:
            known += 1
            assert verdict[0] == math_verify().judge(response, answer)[0], (response, answer)
    assert known > 40


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{3} or so. Answer: 4", "3"),  # a box goes first
        ("\\boxed{3} and $\\boxed{4}$", "3"),
        ("The final answer is 3. Answer: 4", "3"),  # as this does
        ("Answer: 3 Answer: 4", "3"),
        ("Answer: 4 apples", "4"),
        ("Answer: 4", "4.0"),
        ("Answer: 4", "x"),
        ("Answer: 1234567890123", "1234567890123"),  # more digits than floating point tells apart
    ],
)
def test_what_is_not_plain_is_left_to_the_library(response, answer):
    assert integers_equal(response, answer) is None
