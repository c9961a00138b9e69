"""The grading process, started by `pool.py`: responses come through a socket on stdin, a line answers each.

    parent                                        worker
    [verifier, tokenizer's library or null],
        what the tokenizer is loaded from   ->
                                            <-    null when ready, or the text of why it cannot be
    ["text", answer], text                  ->
    ["tokens", answer], int32 token ids     ->
                                            <-    true | false | "traceback" for each response, in order

The parent sends frames: the sizes of head and body (two uint32), the head as JSON, the body as bytes. Every
reply is a line of JSON: what model-written text can do to this process, it cannot do to the trainer by way of
the reply. Kept light (standard library and `tokenizers`, no torch) because a time-out costs a restart.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO

PR_SET_PDEATHSIG = 1
SIZES = struct.Struct("=II")
# Any Python text as bytes and back, also lone surrogates, which UTF-8 alone refuses.
TEXT_ERRORS = "surrogatepass"


def main(parent_pid: int) -> None:
    """Serve until the parent closes the socket or dies."""
    die_with_parent(parent_pid)
    channel = os.dup(0)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)  # what a verifier prints must not end up in the parent's output
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


def serve(channel: int) -> None:
    from megatron_dapo.reward.decoding import load_decoder
    from megatron_dapo.reward.math import load_verifier

    with open(channel, "rb") as requests, open(channel, "wb", buffering=0, closefd=False) as replies:
        frames = read_frames(requests)
        (spec, library), source = next(frames)
        readers: dict[str, Callable[[bytes], str]] = {"text": read_text}
        try:
            verifier = load_verifier(spec)
            if library is not None:
                readers["tokens"] = load_decoder(library, source)
        except ValueError as error:
            replies.write(_line(str(error)))
            return
        replies.write(_line(None))
        for (kind, answer), body in frames:
            replies.write(_line(grade(verifier, spec, readers[kind], body, answer)))


def read_frames(requests: BinaryIO) -> Iterator[tuple[list, bytes]]:
    """Head and body of each frame, until the parent closes the socket."""
    while len(sizes := requests.read(SIZES.size)) == SIZES.size:
        head_size, body_size = SIZES.unpack(sizes)
        yield json.loads(requests.read(head_size)), requests.read(body_size)


def read_text(body: bytes) -> str:
    return body.decode(errors=TEXT_ERRORS)


def grade(verifier, spec: str, read: Callable[[bytes], str], body: bytes, answer: str) -> bool | str:
    """The verifier's word on the response, or the traceback of its failure."""
    try:
        correct = verifier(read(body), answer)
        if not isinstance(correct, bool):  # a score of -1 is true in Python: refuse to guess
            raise TypeError(f"reward.verifier={spec!r} returned {correct!r}, it must return True or False")
        return correct
    except BaseException:  # also SystemExit: nothing a verifier raises may end the worker
        import traceback

        return traceback.format_exc(limit=-20)


def _line(value) -> bytes:
    return json.dumps(value).encode() + b"\n"
