"""What may go wrong with an engine, and with one request to it."""

from __future__ import annotations

import errno

from megatron_dapo.errors import UserError

OUT_OF_FILES = (
    "this process may open no more files, so it cannot connect to an engine; raise the limit (ulimit -n, in "
    "the shell that starts the run) or lower rollout.max_concurrency"
)


class EngineDied(RuntimeError):
    """The server is gone, or its engine is."""


class EngineStalled(TimeoutError):
    """The server has requests and makes no tokens."""


class RequestFailed(RuntimeError):
    """One request failed on a server that goes on working. `reason` is a short word to count it by."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class RequestRefused(UserError):
    """The server refuses the request as it is (4xx): another server would too."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def out_of_files(error: BaseException) -> bool:
    """Whether a connection failed because this process (or host) has no file descriptor left."""
    cause = getattr(error, "os_error", error)
    return isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE)
