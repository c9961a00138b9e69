"""What the log of a vLLM server says about its end: the exceptions that came first, not those that only pass
them on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

LAST_LINES = 20
MOST_CAUSES = 4
# "(Worker pid=12) ERROR 11-24 22:50:54 [core.py:1512] " before the message; plain tracebacks have no such
# prefix.
PREFIX = re.compile(r"^(?:\((?P<process>\w+)[^)]*\) )?(?:(?P<level>[A-Z]+) \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b: .+")  # the last line of a traceback
# Exceptions that only say that another process, or another part of this one, has had one.
PASSED_ON = re.compile(
    r"EngineDeadError|Engine core initialization failed|EngineCore encountered an issue"
    r"|WorkerProc initialization failed|[Ww]orker failed with error"
    r"|See root cause|see stack trace|the stack trace above"
)
# What every start and every exit says.
NOISE = re.compile(r"\] Route: |nanobind| - leaked |skipped remainder|resource_tracker")


def root_causes(lines: Sequence[str]) -> list[str]:
    """The exceptions that ended a server, as "RuntimeError: ..." lines, each once, in the order of the log.

    Left out: what was only warned of, and exceptions that pass another one on, unless there is nothing else.
    """
    causes: list[str] = []
    passed_on: list[str] = []
    for line in lines:
        prefix = PREFIX.match(line)
        assert prefix is not None  # it matches the empty text
        message = line[prefix.end() :]
        if prefix["level"] in ("DEBUG", "INFO", "WARNING") or not EXCEPTION.match(message):
            continue
        (passed_on if PASSED_ON.search(message) else causes).append(message)
    return list(dict.fromkeys(causes or passed_on))[:MOST_CAUSES]


def quote_log(lines: Sequence[str], path: Path) -> str:
    """Root causes, then the last lines, for an error message."""
    lines = [line for line in lines if not NOISE.search(line)]
    quoted = [*root_causes(lines), f"End of {path}:", *(lines[-LAST_LINES:] or ["(empty)"])]
    return "\n".join(line if line.startswith("End of") else f"  | {line}" for line in quoted)
