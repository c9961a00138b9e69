"""The grading process, started by `pool.py`: responses come through a socket on stdin, a line answers each.

    parent                                          worker
    [rules, seconds, bytes, tokenizer's library
        or null], what it is loaded from      ->
                                              <-    null when ready, or the text of why it cannot be
    [[kind, size, answer, rules, row], ...],
        the responses one after another       ->
                                              <-    a line for each response, in order:
                                                    [[decision, score, extracted], ...] by rule,
                                                    or "traceback", or {"refused": "text"}

The parent sends frames: the sizes of head and body (two uint32), the head as JSON, the body as bytes. A
response of kind "text" is text, of kind "tokens" int32 token ids. Every reply is a line of JSON: what
model-written text can do to this process, it cannot do to the trainer by way of the reply. Kept light
(standard library and `tokenizers`, no torch) because a time-out costs a restart.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

PR_SET_PDEATHSIG = 1
SIZES = struct.Struct("=II")
# Any Python text as bytes and back, also lone surrogates, which UTF-8 alone refuses.
TEXT_ERRORS = "surrogatepass"
EXTRACTED_CHARS = 1000  # of what a rule took for the answer, at most


def main(parent_pid: int) -> None:
    """Serve until the parent closes the socket or dies."""
    die_with_parent(parent_pid)
    channel = os.dup(0)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)  # what a rule prints must not end up in the parent's output
    try:
        serve(channel)
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent is gone, however it went (Linux; elsewhere the closed
    socket ends it).
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        sys.exit(0)


def limit_memory(num_bytes: int) -> None:
    """Let this process map no more than `num_bytes` beyond what it has now (Linux)."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def serve(channel: int) -> None:
    with open(channel, "rb") as requests, open(channel, "wb", buffering=0, closefd=False) as replies:
        frames = read_frames(requests)
        (names, timeout_s, memory_bytes, library), source = next(frames)
        rules = Rules(timeout_s)
        readers: dict[str, Callable[[bytes], str]] = {"text": read_text}
        try:
            rules.load(names)
            if library is not None:
                from megatron_dapo.reward.decoding import load_decoder

                readers["tokens"] = load_decoder(library, source)
        except ValueError as error:
            replies.write(_line(str(error)))
            return
        limit_memory(memory_bytes)
        replies.write(_line(None))
        for head, body in frames:
            start = 0
            for kind, size, answer, names, row in head:
                part = body[start : start + size]
                start += size
                replies.write(grade(rules, names, readers[kind], part, answer, row))


def read_frames(requests: BinaryIO) -> Iterator[tuple[list, bytes]]:
    """Head and body of each frame, until the parent closes the socket."""
    while len(sizes := requests.read(SIZES.size)) == SIZES.size:
        head_size, body_size = SIZES.unpack(sizes)
        yield json.loads(requests.read(head_size)), requests.read(body_size)


def read_text(body: bytes) -> str:
    return body.decode(errors=TEXT_ERRORS)


class Rules(dict):
    """Rules by name, loaded when they are first asked for."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self._timeout_s = timeout_s

    def load(self, names: list[str]) -> None:
        for name in names:
            if name not in self:
                from megatron_dapo.reward.rules import load_rule

                self[name] = load_rule(name, self._timeout_s)


def grade(
    rules: Rules,
    names: list[str],
    read: Callable[[bytes], str],
    body: bytes,
    answer: str,
    row: Mapping[str, Any] | None,
) -> bytes:
    """The line for one response: what each rule says, or the traceback of a failure."""
    try:
        rules.load(names)
    except ValueError as error:
        return _line({"refused": str(error)})
    try:
        response, verdicts = read(body), []
        for name in names:
            decision, score, extracted = rules[name](response, answer, row or {"answer": answer})
            verdicts.append((decision, score, extracted and extracted[:EXTRACTED_CHARS]))
        return _line(verdicts)
    except BaseException:  # also SystemExit: nothing a rule raises may end the worker
        import traceback

        return _line(traceback.format_exc(limit=-20))


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"
