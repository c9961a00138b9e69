"""Rules: what a response deserves. `rule(response, answer, row) -> Verdict`, run in the workers of `pool.py`.

    dapo, dapo_boxed, math_verify, auto, exact, choice      the response's text against the answer
    code                                                    its program against unit tests (programs.py)
    package.module:function, http://... and https://...     a rule of the user's (custom.py)

docs/rewards.md says which to take when.
"""

from __future__ import annotations

import re

from megatron_dapo.errors import UserError
from megatron_dapo.reward import math, symbolic
from megatron_dapo.reward.verdict import Row, Rule, Verdict, verdict

_ANSWER_LINE = re.compile(r"answer\s*:[ \t*]*([^\n]+)", re.IGNORECASE)
# A letter, bracketed or not; no word begins with it, and it is not the article of "A man".
_LETTER = r"[\[({]*([A-E])(?:[\])}]+|(?![\w']|(?<=A) [a-z]))"
_CHOICE_TRUTH = re.compile(rf"\s*{_LETTER}\.?\s*")
# At the head of its option: "B", "(B)", "**B.**", "\text{B}", "B) the moon".
_CHOICE = re.compile(rf"[\s*$:]*(?:\\(?:text|textbf|mathrm|mathbf)\{{)?{_LETTER}")
_CHOICE_SENTENCE = re.compile(
    rf"(?:answer|option|choice)(?:\s+(?:is|would be)\s*:?|\s*:)[\s*$]*(?:option\s+)?{_LETTER}", re.IGNORECASE
)
_CHOICE_CHARS = 1000  # of the end, in which the answer is looked for


def dapo(response: str, answer: str, row: Row) -> Verdict:
    """The DAPO release's rule: the last "Answer:" line."""
    return _dapo(response, answer, boxed=False)


def dapo_boxed(response: str, answer: str, row: Row) -> Verdict:
    """The newer one of verl: where there is no "Answer:" line, the last \\boxed{}."""
    return _dapo(response, answer, boxed=True)


def _dapo(response: str, answer: str, *, boxed: bool) -> Verdict:
    said = math.dapo_answer(response, boxed=boxed)
    return verdict(said is not None and math.equals(said, answer), said)


def math_verify(response: str, answer: str, row: Row) -> Verdict:
    """The math-verify library's word alone."""
    return verdict(*symbolic.math_verify().judge(response, answer))


def auto(response: str, answer: str, row: Row) -> Verdict:
    """Correct if `dapo_boxed` says so, else what math-verify says; of two integers that is known at once.

    Where the answer is an equation math-verify alone decides: dapo compares right-hand sides only.
    """
    try:
        first = dapo_boxed(response, answer, row)
    except UserError:  # nothing is left of the answer
        return math_verify(response, answer, row)
    if first.decision == "correct" and "=" not in answer:
        return first
    if known := symbolic.integers_equal(response, answer):
        return verdict(*known)
    try:
        return math_verify(response, answer, row)
    except UserError:  # it cannot read the answer: dapo's word stands
        return first


def exact(response: str, answer: str, row: Row) -> Verdict:
    """The last "Answer:" line, else the last \\boxed{}, else the whole response is the answer, character by
    character but for spaces around it.
    """
    said = math.dapo_answer(response)
    said = (response if said is None else said).strip()
    return verdict(said == answer.strip(), said or None)


def choice(response: str, answer: str, row: Row) -> Verdict:
    """One of the letters A to E, of the last 1000 characters: of the last "Answer:" line or \\boxed{}, else
    of the last sentence that says "answer is", else of the last line if it has nothing but the letter.

    UserError if the answer is not such a letter.
    """
    truth = _CHOICE_TRUTH.fullmatch(answer)
    if truth is None:
        raise UserError(f"the rule choice needs an answer from A to E, not {answer!r}; correct the row")
    said = _chosen(response[-_CHOICE_CHARS:].rstrip())
    return verdict(said == truth[1], said)


def _chosen(text: str) -> str | None:
    for marked in (*_ANSWER_LINE.findall(text)[-1:], math.last_boxed(text)):
        if marked is not None and (match := _CHOICE.match(marked)):
            return match[1]
    for sentence in reversed(list(_CHOICE_SENTENCE.finditer(text))):
        if sentence[1].isupper():
            return sentence[1]
    match = re.fullmatch(rf"[\s*]*{_LETTER}[.\s*]*", text.rpartition("\n")[2])
    return match[1] if match else None


RULES: dict[str, Rule] = {
    "dapo": dapo,
    "dapo_boxed": dapo_boxed,
    "math_verify": math_verify,
    "auto": auto,
    "exact": exact,
    "choice": choice,
}


def needs_row(name: str) -> bool:
    """Whether the rule may look at more of the row than its answer."""
    return name not in RULES and name != "code"


def load_rule(name: str, timeout_s: float = 10.0, field: str = "reward.verifier") -> Rule:
    """The rule of this name, ready to be called. `timeout_s`: in which one of its calls should end.

    UserError names `field`, where the name is from, and what is wrong with it: unknown, not importable, of
    another signature.
    """
    if name in RULES:
        if name in ("math_verify", "auto"):
            symbolic.math_verify()
        return RULES[name]
    # What only these need is imported late: a worker is restarted after every time-out.
    if name == "code":
        from megatron_dapo.reward.programs import program_rule

        return program_rule(timeout_s)
    from megatron_dapo.reward.custom import function_rule, http_rule

    if name.startswith(("http://", "https://")):
        return http_rule(name, timeout_s, field)
    return function_rule(name, [*RULES, "code"], field)
