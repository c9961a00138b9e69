"""Mathematical equality by the math-verify library, and what can be judged without it just as it does."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from megatron_dapo.errors import UserError

_MATH_DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed\{")
# Up to 12 digits: math-verify compares what is longer in floating point.
_INTEGER = r"(-?[1-9][0-9]{0,11}|0)"
_PLAIN_TRUTH = re.compile(rf" *{_INTEGER} *")
_LAST_LINE = re.compile(rf"answer:\s{{1,10}}(\$?){_INTEGER}\1\.?\s*\Z", re.IGNORECASE)
_BOX = rf"\\boxed\{{{_INTEGER}\}}"
_LAST_BOX = re.compile(rf"(?:(?<![\\$0-9])\${_BOX}\$|\\\({_BOX}\\\)|\s{_BOX})\.?\s*\Z")
_ANCHOR = re.compile(r"answer:", re.IGNORECASE)
_FINAL = re.compile(r"final answer", re.IGNORECASE)
# What the end of a response is searched in.
_TAIL_CHARS = 100


class MathVerify:
    """The library, once imported; UserError where it is not installed."""

    def __init__(self) -> None:
        try:
            from math_verify import grader, parser
        except ImportError as error:
            raise UserError(
                "math-verify cannot be imported; install it with `pip install math-verify==0.9.0` or set "
                "reward.verifier=dapo_boxed"
            ) from error
        import logging

        logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its time-outs are off
        self._out_of_memory = False
        # Whatever fails in these it takes for "not an expression" or "not equal": tell lack of memory.
        places = ((parser, "parse_latex_cached"), (parser, "parse_expr_cached"), (grader, "sympy_expr_eq"))
        for module, name in places:
            setattr(module, name, self._watched(getattr(module, name)))

    def judge(self, response: str, answer: str) -> tuple[bool, str | None]:
        """Whether they are equal, and what was read in the response, None for nothing.

        It reads the whole response, a \\boxed{} before an "Answer:" line, and can run very long on hard
        expressions. Its own time-outs (SIGALRM) are off because they can be swallowed; the pool kills
        instead. MemoryError when memory ran out; UserError if the answer of the data set cannot be read:
        every response to it would be silently wrong.
        """
        from math_verify import verify

        self._out_of_memory = False
        truth = self._truth(answer)
        prediction = self._parse(response)
        equal = bool(verify(truth, prediction, timeout_seconds=None))
        if self._out_of_memory and not equal:
            raise MemoryError("math-verify ran out of memory")
        return equal, str(prediction[-1]) if prediction else None

    @functools.lru_cache(maxsize=256)  # noqa: B019  # one object lives as long as its process
    def _truth(self, answer: str) -> list:
        # LaTeX is only recognised inside math; a bare "\frac{1}{2}" or "x^2" would be lost.
        parsed = self._parse(answer if _MATH_DELIMITER.search(answer) else f"\\boxed{{{answer}}}")
        if not parsed:
            raise UserError(
                f"math-verify cannot read the answer {answer!r}; correct the row or use "
                "reward.verifier=dapo_boxed"
            )
        return parsed

    def _parse(self, text: str) -> list:
        from math_verify import parse

        # The signature says int; None is what the library documents for "no time-out".
        try:
            return parse(text, parsing_timeout=None, raise_on_error=True)  # pyright: ignore[reportArgumentType]
        except MemoryError:
            raise
        except Exception:  # as the library does unless told otherwise
            return []

    def _watched(self, function: Callable) -> Callable:
        def watched(*args):
            try:
                return function(*args)
            except MemoryError:
                self._out_of_memory = True
                raise

        return watched


@functools.cache
def math_verify() -> MathVerify:
    return MathVerify()


def math_verify_correct(response: str, answer: str) -> bool:
    """Mathematical equality: "0.5", "1/2" and "\\frac12" agree. As `MathVerify.judge`."""
    return math_verify().judge(response, answer)[0]


def integers_equal(response: str, answer: str) -> tuple[bool, str] | None:
    """What `MathVerify.judge` says, where it can be told without the library: the answer is an integer and
    the response ends with the only thing that the library would look at, another integer. None elsewhere.

    That is an "Answer:" line where neither \\boxed nor "final answer" goes before it in the library's order,
    or a \\boxed{} that is the only one.
    """
    if not (truth := _PLAIN_TRUTH.fullmatch(answer)):
        return None
    boxes = response.count("\\boxed")
    pattern = _LAST_BOX if boxes else _LAST_LINE
    match = pattern.search(response[-_TAIL_CHARS:])
    if not match or boxes > 1 or _FINAL.search(response):
        return None
    if not boxes and len(_ANCHOR.findall(response)) > 1:
        return None
    said = next(group for group in match.groups()[0 if boxes else 1 :] if group)
    return said == truth[1], said
