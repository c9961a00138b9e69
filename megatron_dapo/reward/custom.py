"""Rules of the user's: a function of a module, or a service that is asked over HTTP.

Both say True or False, a number, or {"score": number, "correct": bool, "extracted": text}, of which only the
score is needed. A number alone is correct from 1 on, the full score of the other rules.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from megatron_dapo.errors import UserError
from megatron_dapo.reward.verdict import Row, Rule, Verdict


def read_verdict(value: Any, who: str) -> Verdict:
    """The Verdict that a rule of the user's means. TypeError for anything else."""
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    if isinstance(value, bool):
        return Verdict("correct" if value else "wrong", 1.0 if value else -1.0)
    if isinstance(value, Mapping):
        score, correct = read_verdict(value.get("score"), who).score, value.get("correct")
        extracted = value.get("extracted")
        if correct is None:
            correct = score >= 1
        if isinstance(correct, bool) and (extracted is None or isinstance(extracted, str)):
            return Verdict("correct" if correct else "wrong", score, extracted)
    elif isinstance(value, int | float) and math.isfinite(value):
        return Verdict("correct" if value >= 1 else "wrong", float(value))
    raise TypeError(
        f"{who} returned {value!r:.200}; it must be True, False, a finite number or "
        '{"score": number, "correct": bool, "extracted": text}'
    )


def function_rule(spec: str, others: Sequence[str], field: str) -> Rule:
    """The rule of 'package.module:function'. UserError if there is no such function of (response, answer) or
    (response, answer, row). For the message: `others`, names that are no functions; `field`, where the name
    is from.
    """
    module_name, colon, function_name = spec.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(
            f"{field}={spec!r} must be {', '.join(map(repr, others))}, 'package.module:function' or a URL; "
            "correct it"
        )
    named = f"{field}={spec!r}"
    function = _find(named, module_name, function_name)
    with_row = _takes_row(named, function)
    call = _waited_for(function)

    def rule(response: str, answer: str, row: Row) -> Verdict:
        value = call(response, answer, row) if with_row else call(response, answer)
        return read_verdict(value, named)

    return rule


def _find(named: str, module_name: str, function_name: str) -> Callable:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{named}: importing {module_name} failed ({error!r}); correct the name or put "
            "its folder on PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if callable(function):
        return function
    names = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
    raise UserError(
        f"{named}: {module_name} has no function {function_name!r}; it offers {', '.join(names) or 'nothing'}"
    )


def _takes_row(named: str, function: Callable) -> bool:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return False
    for arguments in (("response", "answer", "row"), ("response", "answer")):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return len(arguments) == 3
    raise UserError(
        f"{named} must take (response, answer) or (response, answer, row); its signature is {signature}"
    )


def _waited_for(function: Callable) -> Callable:
    """The function, run to its end on one event loop if it is async."""
    if not inspect.iscoroutinefunction(function):
        return function
    import asyncio

    runner = asyncio.Runner()
    return lambda *arguments: runner.run(function(*arguments))


def http_rule(url: str, timeout_s: float, field: str) -> Rule:
    """The rule of a service: POST of {"response", "answer", "row"} as JSON, answered with JSON. An answer
    other than 200 and a connection that fails are exceptions: no grade. `field` as in `function_rule`.
    """
    parts = urlsplit(url)
    if not parts.hostname:
        raise UserError(f"{field}={url!r} has no host; give http://host:port/path")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout_s)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def ask(body: bytes) -> tuple[int, bytes]:
        connection.request("POST", target, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.read()

    def rule(response: str, answer: str, row: Row) -> Verdict:
        body = json.dumps({"response": response, "answer": answer, "row": row}).encode()
        try:
            status, reply = ask(body)
        except (HTTPException, ConnectionError):  # the service closed what was kept open: once more
            connection.close()
            status, reply = ask(body)
        if status != 200:
            raise ConnectionError(f"{url} answered {status}: {reply[:200]!r}")
        return read_verdict(json.loads(reply), url)

    return rule
