"""The grading process: reads groups from a socket on stdin, answers with one line per response. Started by
`pool.py`.

    parent                              worker
    (starts it)                   <-    null when ready, or the text of why it cannot be
    [answer, [response, ...]]     ->
                                  <-    true | false | "traceback" for each response, in order, as soon as it
                                  is known

Every line is JSON: what model-written text can do to this process, it cannot do to the trainer by way of the
reply. Kept light (standard library, no torch) because a time-out costs a restart.
"""

from __future__ import annotations

import json
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent_pid: int, spec: str) -> None:
    """Serve until the parent closes the socket or dies."""
    die_with_parent(parent_pid)
    channel = os.dup(0)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)  # what a verifier prints must not end up in the parent's output
    try:
        serve(channel, spec)
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


def serve(channel: int, spec: str) -> None:
    from megatron_dapo.reward.math import load_verifier

    with open(channel, "rb") as requests, open(channel, "wb", buffering=0, closefd=False) as replies:
        try:
            verifier = load_verifier(spec)
        except ValueError as error:
            replies.write(_line(str(error)))
            return
        replies.write(_line(None))
        for request in requests:
            answer, responses = json.loads(request)
            for response in responses:
                replies.write(_line(grade(verifier, spec, response, answer)))


def grade(verifier, spec: str, response: str, answer: str) -> bool | str:
    """The verifier's word, or the traceback of its failure."""
    try:
        correct = verifier(response, answer)
        if not isinstance(correct, bool):  # a score of -1 is true in Python: refuse to guess
            raise TypeError(f"reward.verifier={spec!r} returned {correct!r}, it must return True or False")
        return correct
    except BaseException:  # also SystemExit: nothing a verifier raises may end the worker
        import traceback

        return traceback.format_exc(limit=-20)


def _line(value) -> bytes:
    return json.dumps(value).encode() + b"\n"
