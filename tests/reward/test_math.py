import pytest

from megatron_dapo.reward.math import dapo_correct, load_verifier, math_verify_correct, normalise

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
def test_math_verify_accepts_equal_values(response, answer):
    assert math_verify_correct(response, answer) is True


@pytest.mark.parametrize(
    ("response", "answer"), [("Answer: 0.51", "\\frac{1}{2}"), ("", "7"), ("no number", "7")]
)
def test_math_verify_rejects(response, answer):
    assert math_verify_correct(response, answer) is False


def test_math_verify_refuses_an_answer_it_cannot_read():
    with pytest.raises(ValueError, match="cannot read the answer ''"):
        math_verify_correct("Answer: 7", "")


def test_math_verify_leaves_the_alarm_signal_alone(monkeypatch):
    import signal

    def forbidden(*_):
        raise AssertionError("signal.alarm was used")

    monkeypatch.setattr(signal, "alarm", forbidden)
    assert math_verify_correct("Answer: 1/2", "0.5")


MODULE = """
not_a_function = 3
def one_argument(response): return True
def right(response, answer): return response == answer
async def slow(response, answer): return True
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_verifier_module.py").write_text(MODULE)
    (tmp_path / "broken_verifier_module.py").write_text("import does_not_exist_anywhere")
    monkeypatch.syspath_prepend(tmp_path)


def test_load_verifier_finds_the_three_kinds(user_module):
    assert load_verifier("dapo") is dapo_correct
    assert load_verifier("math_verify") is math_verify_correct
    assert load_verifier("user_verifier_module:right")("a", "a")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dappo", "must be 'dapo', 'math_verify' or 'package.module:function'"),
        ("", "must be 'dapo'"),
        (":right", "must be 'dapo'"),
        ("user_verifier_module:", "must be 'dapo'"),
        ("no_such_module_at_all:right", "PYTHONPATH"),
        ("broken_verifier_module:right", "does_not_exist_anywhere"),
        ("user_verifier_module:wrong", "it offers one_argument, right, slow"),
        ("user_verifier_module:not_a_function", "has no function 'not_a_function'"),
        ("user_verifier_module:one_argument", "must take \\(response, answer\\)"),
        ("user_verifier_module:slow", "async"),
    ],
)
def test_load_verifier_explains_what_is_wrong(user_module, spec, message):
    with pytest.raises(ValueError, match=message) as error:
        load_verifier(spec)
    assert f"reward.verifier={spec!r}" in str(error.value)
