"""The rule `code`: the program in a response against unit tests.

The answer is JSON, {"inputs": [...], "outputs": [...]} (standard input and output of each test), with
"fn_name" for a function that is called with a list of arguments each time; or it is Python that checks the
program, such as assert statements, each line of the first level a test.

Every test is a process of its own (program_child.py): without a network, in namespaces of its own where the
kernel allows that, with limits of memory, files and time. What a program does to its process is a test that
failed, not a grade that crashed.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dapo.errors import UserError
from megatron_dapo.reward import program_child
from megatron_dapo.reward.verdict import Row, Rule, Verdict

_FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
MEMORY_BYTES = 1 << 30
# Of the time that a grade may take; the rest is for the processes' start.
SHARE_OF_TIME = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTest:
    """stdin and stdout of a whole run, or the arguments and the result of a function, or checks."""

    stdin: str = ""
    stdout: str | None = None
    function: str | None = None
    arguments: list[Any] | None = None
    result: Any = None
    checks: str | None = None


def program_rule(timeout_s: float) -> Rule:
    """The rule `code`: correct if all tests pass; the score goes from -1 for none of them to +1. All tests of
    a response share SHARE_OF_TIME of `timeout_s`; those that it is not enough for have failed.
    """

    def rule(response: str, answer: str, row: Row) -> Verdict:
        tests = read_tests(answer)
        blocks = _FENCE.findall(response)
        if not blocks:
            return Verdict("no_answer", -1.0)
        end = time.monotonic() + SHARE_OF_TIME * timeout_s
        passed = sum(passes(blocks[-1], test, end) for test in tests)
        score = 2 * passed / len(tests) - 1
        return Verdict("correct" if passed == len(tests) else "wrong", score, blocks[-1])

    return rule


def isolation() -> str:
    """How programs are kept from the network on this machine, in words."""
    probe = "import program_child, sys; sys.exit(not program_child.own_namespaces())"
    folder = str(Path(program_child.__file__).parent)
    code = f"import sys; sys.path.append({folder!r}); {probe}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True)
    if done.returncode == 0:
        return "in a network namespace of their own"
    return "by refusing sockets and other processes (the kernel allows no namespaces)"


def read_tests(answer: str) -> list[UnitTest]:
    """The tests of an answer. UserError if it holds none."""
    try:
        value = json.loads(answer)
    except ValueError:
        value = None
    tests = _from_lists(value) if isinstance(value, Mapping) else _from_checks(answer)
    if not tests:
        raise UserError(
            f"the rule code finds no test in the answer {answer[:100]!r}; give JSON with equally many "
            "'inputs' and 'outputs', or Python with assert statements"
        )
    return tests


def _from_lists(value: Mapping[str, Any]) -> list[UnitTest]:
    inputs, outputs, function = value.get("inputs"), value.get("outputs"), value.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        return []
    pairs = zip(inputs, outputs, strict=True)
    if function:
        return [UnitTest(function=function, arguments=list(i), result=o) for i, o in pairs]
    return [UnitTest(stdin=_lines(i), stdout=_lines(o)) for i, o in pairs]


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _from_checks(source: str) -> list[UnitTest]:
    """A test of each assert of the first level, with all that is no assert before it."""
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError):
        return []
    setup = [ast.unparse(s) for s in statements if not isinstance(s, ast.Assert)]
    asserts = [ast.unparse(s) for s in statements if isinstance(s, ast.Assert)]
    if asserts:
        return [UnitTest(checks="\n".join([*setup, check])) for check in asserts]
    calls = any(isinstance(s, ast.Expr) and isinstance(s.value, ast.Call) for s in statements)
    return [UnitTest(checks=source)] if calls else []


def passes(program: str, test: UnitTest, end: float) -> bool:
    """Whether the program passes the test before `end` of time.monotonic()."""
    if (seconds := end - time.monotonic()) <= 0:
        return False
    secret = secrets.token_hex(16)
    request = {
        "program": program,
        "function": test.function,
        "arguments": test.arguments,
        "checks": test.checks,
        "secret": secret,
        "memory_bytes": MEMORY_BYTES,
        "cpu_seconds": int(seconds) + 1,
    }
    with tempfile.TemporaryDirectory(prefix="dapo-program-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "stdin").write_text(test.stdin, errors="replace")
        if not _run(json.dumps(request).encode(), folder, seconds):
            return False
        if test.checks is not None:
            return _read(folder / "result") == secret
        if test.function is not None:
            return _same_result(_read(folder / "result"), test.result)
        return _same_text(_read(folder / "stdout"), test.stdout or "")


def _run(request: bytes, folder: Path, seconds: float) -> bool:
    """Whether the program came to its end without an error and in time. Nothing of it is left."""
    command = [sys.executable, "-I", "-S", program_child.__file__, str(folder)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
    ) as process:
        try:
            process.communicate(request, timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode == 0


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _same_text(printed: str, expected: str) -> bool:
    """Line for line, without spaces at their ends and empty lines at the end."""
    return [line.rstrip() for line in printed.rstrip().split("\n")] == [
        line.rstrip() for line in expected.rstrip().split("\n")
    ]


def _same_result(written: str, expected: Any) -> bool:
    """As JSON, which has no tuples. A list of one, as some data sets write a result, is that one too."""
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        return False
    plain = json.loads(json.dumps(expected))
    return value == plain or (isinstance(plain, list) and len(plain) == 1 and value == plain[0])
