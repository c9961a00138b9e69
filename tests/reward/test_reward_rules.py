"""The rules that compare texts: what each of them accepts, and what it takes for the answer."""

import pytest

from megatron_dapo.errors import UserError
from megatron_dapo.reward.rules import RULES, load_rule, needs_row
from megatron_dapo.reward.verdict import Verdict


def judge(rule: str, response: str, answer: str) -> Verdict:
    return load_rule(rule)(response, answer, {"answer": answer})


def correct(extracted: str) -> Verdict:
    return Verdict("correct", 1.0, extracted)


def wrong(extracted: str) -> Verdict:
    return Verdict("wrong", -1.0, extracted)


NO_ANSWER = Verdict("no_answer", -1.0)


def test_only_the_newer_dapo_rule_reads_boxes():
    assert judge("dapo", "It is \\boxed{7}.", "7") == NO_ANSWER
    assert judge("dapo_boxed", "It is \\boxed{7}.", "7") == correct("7")
    for rule in ("dapo", "dapo_boxed"):
        assert judge(rule, "Answer: 7", "7") == correct("7")
        assert judge(rule, "Answer: 6\n\\boxed{7}", "7") == wrong("6")
        assert judge(rule, "7", "7") == NO_ANSWER


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("Answer: 7", "7", correct("7")),
        ("Answer: 7.", "7", correct("7")),  # dapo keeps the full stop, math-verify does not
        ("Answer: 0.5", "\\frac{1}{2}", correct("0.5")),
        ("Answer: 8", "7", wrong("8")),
        ("I do not know", "7", NO_ANSWER),
        ("Answer: Evelyn", "Evelyn", correct("Evelyn")),
        ("Answer: $11a+c$", "$7 = 11a+c$", wrong("11a+c")),  # dapo compares right-hand sides alone
        ("Answer: $x=5$", "5", correct("$x=5$")),
        ("Answer: 30 degrees", "30^\\circ", correct("30 degrees")),
    ],
)
def test_auto_is_dapo_or_math_verify(response, answer, expected):
    assert judge("auto", response, answer) == expected


def test_auto_asks_math_verify_where_dapo_cannot_read_the_answer():
    """Nothing is left of "" for either."""
    with pytest.raises(UserError, match="math-verify cannot read the answer ''"):
        judge("auto", "Answer: 7", "")


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("Answer:  Paris ", "Paris", correct("Paris")),
        ("It is \\boxed{x+1}", "x+1", correct("x+1")),
        (" Paris\n", "Paris", correct("Paris")),
        ("Answer: paris", "Paris", wrong("paris")),
        ("Answer: 7.0", "7", wrong("7.0")),
        ("Answer: 1,000", "1000", wrong("1,000")),
        (" \n", "Paris", NO_ANSWER),
    ],
)
def test_exact(response, answer, expected):
    assert judge("exact", response, answer) == expected


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: B", "B"),
        ("**Answer:** (C)", "C"),
        ("Answer: D) the moon", "D"),
        ("Answer: \\boxed{E}", "E"),
        ("So $\\boxed{\\text{D}}$.", "D"),
        ("The answer is (B).", "B"),
        ("A is wrong. The correct option is: C because", "C"),
        ("I first said the answer is A, but the answer is B.", "B"),
        ("Let me see.\n**A**.", "A"),
        ("Answer: a", None),
        ("Answer: A man", None),
        ("Answer: Bob", None),
        ("A or B", None),
        ("F", None),
        ("Answer: C" + " x" * 501, None),  # outside the last 1000 characters
    ],
)
def test_choice(response, letter):
    assert judge("choice", response, letter or "A") == (correct(letter) if letter else NO_ANSWER)
    if letter:
        other = "A" if letter != "A" else "B"
        assert judge("choice", response, f"({other})") == wrong(letter)


@pytest.mark.parametrize("answer", ["F", "AB", "", "7"])
def test_choice_refuses_an_answer_that_is_no_letter(answer):
    with pytest.raises(UserError, match="needs an answer from A to E"):
        judge("choice", "Answer: A", answer)


def test_rules_of_texts_need_no_row():
    assert not any(map(needs_row, RULES))
    assert not needs_row("code") and all(map(needs_row, ("a:b", "http://a")))
