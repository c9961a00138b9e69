"""The rule of DAPO: the response's last answer, as text, after both sides are normalised alike."""

from __future__ import annotations

import functools
import re

from megatron_dapo.errors import UserError

# DAPO reads only the end of a response, which also bounds the work on degenerate text.
TAIL_CHARS = 300
BOXED_TAIL_CHARS = 100

_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_BOXED = "\\boxed{"
_PLAIN_INTEGER = re.compile(r" *(-?[0-9]+) *")

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


def dapo_correct(response: str, answer: str, *, boxed: bool = True) -> bool:
    """The rule of verl's `math_dapo`: the last "Answer:" line of the last 300 characters, else the last
    \\boxed{} of the last 100, equals the answer after both are normalised alike. No line, no box, or an empty
    one: wrong. The DAPO release itself has no box: boxed=False.

    Raises UserError if nothing is left of the answer itself: the release would then call every empty
    prediction correct.
    """
    prediction = dapo_answer(response, boxed=boxed)
    return prediction is not None and equals(prediction, answer)


def dapo_answer(response: str, *, boxed: bool = True) -> str | None:
    """What `dapo_correct` takes for the response's answer, as it stands there; None: there is none."""
    tail = response[-TAIL_CHARS:]
    lines = _ANSWER_LINE.findall(tail)
    if lines or not boxed:
        return lines[-1] if lines else None
    return last_boxed(tail[-BOXED_TAIL_CHARS:])


def equals(prediction: str, answer: str) -> bool:
    """Whether both are the same text once normalised. UserError if nothing is left of the answer."""
    truth = normalise(answer)
    if not truth:
        raise UserError(f"nothing is left of the answer {answer!r} after normalisation; correct the row")
    return normalise(prediction) == truth


@functools.lru_cache(maxsize=1024)  # an answer is asked for with each response of its group
def normalise(text: str) -> str:
    """One spelling for answers that differ in units, spaces, LaTeX wrapping, \\frac and \\sqrt shorthand or
    thousands commas.

    One departure from the release: it reads "$$34$$" as an empty first math span and loses the 34.
    """
    if plain := _PLAIN_INTEGER.fullmatch(text):  # none of what follows changes one
        return plain[1]
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


def last_boxed(text: str) -> str | None:
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
