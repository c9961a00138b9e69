"""Verifiers: is the response's answer the right one? `verifier(response, answer) -> bool`, run in the workers
of `pool.py`.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import cast

from megatron_dapo.errors import UserError

Verifier = Callable[[str, str], bool]

# DAPO reads only the end of a response, which also bounds the work on degenerate text.
TAIL_CHARS = 300
BOXED_TAIL_CHARS = 100

_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_BOXED = "\\boxed{"
_MATH_DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed\{")

# The rewrites of Minerva (arXiv 2206.14858, appendix on answer normalisation), which DAPO took over. They are
# plain text replacements, applied in this order, wherever the text occurs: "an " goes even where a word
# merely ends in it.
_REWRITES = (("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"))
_REWRITES += ((",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"))
_WORDS = (
    "square",
    "ways",
    "integers",
    "dollars",
    "mph",
    "inches",
    "hours",
    "km",
    "units",
    "\\ldots",
    "sue",
    "points",
    "feet",
)
_WORDS += (
    "minutes",
    "digits",
    "cents",
    "degrees",
    "cm",
    "gm",
    "pounds",
    "meters",
    "meals",
    "edges",
    "students",
)
_WORDS += ("childrentickets", "multiples")
_MARKS = (
    "\\text{s}",
    "\\text{.}",
    "\\text{\ns}",
    "\\text{}^2",
    "\\text{}^3",
    "\\text{\n}",
    "\\text{}",
    "\\mathrm{th}",
)
_MARKS += ("^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots")


def dapo_correct(response: str, answer: str) -> bool:
    """The rule of the DAPO release (verl `math_dapo`): the last "Answer:" line of the last 300 characters,
    else the last \\boxed{} of the last 100, equals the answer after both are normalised alike. No line, no
    box, or an empty one: wrong.

    Raises UserError if nothing is left of the answer itself: the release would then call every empty
    prediction correct.
    """
    tail = response[-TAIL_CHARS:]
    lines = _ANSWER_LINE.findall(tail)
    prediction = lines[-1] if lines else _last_boxed(tail[-BOXED_TAIL_CHARS:])
    if prediction is None:
        return False
    truth = normalise(answer)
    if not truth:
        raise UserError(f"nothing is left of the answer {answer!r} after normalisation; correct the row")
    return normalise(prediction) == truth


def normalise(text: str) -> str:
    """One spelling for answers that differ in units, spaces, LaTeX wrapping, \\frac and \\sqrt shorthand or
    thousands commas.

    One departure from the release: it reads "$$34$$" as an empty first math span and loses the 34.
    """
    text = text.rpartition("=")[2]
    for before, after in _REWRITES:
        text = text.replace(before, after)
    for noise in (*_WORDS, *_MARKS):
        text = text.replace(noise, "")
    parts = text.replace("$$", "$").split("$", 2)
    if len(parts) == 3:  # "so$34$cats": the first math span is the answer
        text = f"${parts[1]}$"
    for command in ("text", "textbf", "overline"):
        text = re.sub(rf"\\{command}\{{(.*?)\}}", r"\1", text)
    text = re.sub(r"\\boxed\{(.*)\}", r"\1", text)
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text)
    text = text.replace("$", "")
    without_commas = text.replace(",", "")
    return without_commas if without_commas.isdigit() else text.strip()


def _last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{}, braces balanced; None if there is none or it is cut off."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start += len(_BOXED)
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return None


def math_verify_correct(response: str, answer: str) -> bool:
    """Mathematical equality by the math-verify library: "0.5", "1/2" and "\\frac12" agree.

    It reads the whole response, a \\boxed{} before an "Answer:" line, and can run very long on hard
    expressions. Its own time-outs (SIGALRM) are off because they can be swallowed; the pool kills instead.

    Raises UserError if the answer of the data set cannot be read: every response to it would be silently
    wrong.
    """
    from math_verify import parse, verify

    # The signatures say int; None is what the library documents for "no time-out".
    prediction = parse(response, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return bool(verify(_parsed_answer(answer), prediction, timeout_seconds=None))


@functools.lru_cache(maxsize=16)
def _parsed_answer(answer: str) -> list:
    from math_verify import parse

    # LaTeX is only recognised inside math; a bare "\frac{1}{2}" or "x^2" would be lost.
    text = answer if _MATH_DELIMITER.search(answer) else f"{_BOXED}{answer}}}"
    parsed = parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not parsed:
        raise UserError(
            f"math-verify cannot read the answer {answer!r}; correct the row or use reward.verifier=dapo"
        )
    return parsed


def load_verifier(spec: str) -> Verifier:
    """The function named by reward.verifier: 'dapo', 'math_verify' or 'package.module:function'. UserError
    if there is none.
    """
    if spec == "dapo":
        return dapo_correct
    if spec == "math_verify":
        _import(
            spec,
            "math_verify",
            "install it with `pip install math-verify==0.9.0` or set reward.verifier=dapo",
        )
        import logging

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
        return math_verify_correct
    module_name, colon, function_name = spec.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(
            f"reward.verifier={spec!r} must be 'dapo', 'math_verify' or 'package.module:function'; correct it"
        )
    module = _import(spec, module_name, "correct the name or put its folder on PYTHONPATH")
    function = getattr(module, function_name, None)
    if not callable(function):
        names = (
            ", ".join(sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")))
            or "nothing"
        )
        raise UserError(
            f"reward.verifier={spec!r}: {module_name} has no function {function_name!r}; it offers {names}"
        )
    _check_signature(spec, function)
    return cast(Verifier, function)


def _import(spec: str, module_name: str, remedy: str):
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # user code runs at import and may raise anything
        raise UserError(
            f"reward.verifier={spec!r}: importing {module_name} failed with {error!r}; {remedy}"
        ) from error


def _check_signature(spec: str, function: Callable) -> None:
    import inspect

    if inspect.iscoroutinefunction(function):
        raise UserError(
            f"reward.verifier={spec!r} is async; make it a plain function, it has a process of its own"
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind("response", "answer")
    except TypeError as error:
        raise UserError(
            f"reward.verifier={spec!r} must take (response, answer), its signature is {signature}: {error}"
        ) from None
