import pytest

from megatron_dapo.reward.math import dapo_correct, normalise

CORRECT = [
    ("So 3+4 is 7.\nAnswer: 7", "7"),
    ("aNsWeR :  7", "7"),
    ("Answer:\n7", "7"),
    ("Answer: 6\nWait.\nAnswer: 7", "7"),  # the last line counts
    ("Answer: 7\n\\boxed{6}", "7"),  # the line counts, not the box
    ("Answer: $7$", "7"),
    ("Answer: the result is $7$ cats", "7"),
    ("Answer: $$7$$", "7"),
    ("Answer: \\boxed{7}", "7"),
    ("Answer: x = 7", "7"),
    ("Answer: 1,234,567", "1234567"),
    ("Answer: 7 degrees", "7^\\circ"),
    ("Answer: 7\\text{ cm}", "7"),
    ("Answer: 12 square feet", "12"),
    ("Answer: \\$18", "18 dollars"),
    ("Answer: $\\frac12$", "\\frac{1}{2}"),
    ("Answer: 2\\sqrt3", "2\\sqrt{3}"),
    ("Answer: \\textbf{7}", "\\overline{7}"),
    ("It is \\boxed{7}.", "7"),
    ("First \\boxed{6}, then \\boxed{\\frac{1}{2}} .", "\\frac12"),
    ("Answer: 7" + " " * 280, "7"),
]
WRONG = [
    ("Answer: 6", "7"),
    ("Answer: 6\n\\boxed{7}", "7"),
    ("Answer: 7.", "7"),  # the rule keeps a full stop
    ("Answer: 0.5", "\\frac{1}{2}"),  # equality of strings, not of numbers
    ("the answer is 7", "7"),
    ("7", "7"),
    ("", "7"),
    ("Answer: $$", "7"),
    ("Answer: degrees", "7"),
    ("\\boxed{7", "7"),
    ("Answer: 7\n" + "x" * 300, "7"),  # outside the last 300 characters
    ("\\boxed{7}" + "x" * 100, "7"),  # outside the last 100 characters
]


@pytest.mark.parametrize(("response", "answer"), CORRECT)
def test_dapo_accepts(response, answer):
    assert dapo_correct(response, answer) is True


@pytest.mark.parametrize(("response", "answer"), WRONG)
def test_dapo_rejects(response, answer):
    assert dapo_correct(response, answer) is False


def test_dapo_windows_end_at_exactly_300_and_100_characters():
    assert dapo_correct("Answer: 7\n" + "x" * 290, "7")
    assert not dapo_correct("Answer: 7\n" + "x" * 291, "7")
    assert dapo_correct("\\boxed{7}" + "x" * 91, "7")
    assert not dapo_correct("\\boxed{7}" + "x" * 92, "7")


@pytest.mark.parametrize("answer", ["", "degrees", "\\text{}", "$$"])
def test_dapo_refuses_an_answer_of_which_nothing_is_left(answer):
    with pytest.raises(ValueError, match="correct the row"):
        dapo_correct("Answer: 7", answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\text{and}", ","),
        ("x,\\text{and}2", "x,2"),
        ("1,\\text{and}2", "12"),  # the rule takes any comma between digits for a thousands separator
        ("\\mbox{Evelyn}", "Evelyn"),
        ("1,23", "123"),
        ("(1,23)", "(1,23)"),
        ("\\fracab c", "\\frac{a}{b}c"),
        ("5\\text{m}^2", "5"),
        ("25^{th}", "25^{th}"),
        ("a=b=3", "3"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_plain_integers_are_normalised_as_all_else():
    assert normalise(" 007 ") == "007" and normalise("-7") == "-7" and normalise("\t7") == "7"


def test_the_release_itself_knows_no_box():
    assert dapo_correct("\\boxed{7}", "7") and not dapo_correct("\\boxed{7}", "7", boxed=False)
    assert dapo_correct("Answer: 7", "7", boxed=False)
