"""The limit on open files: each request in flight may need a connection of its own."""

from __future__ import annotations

import resource

from megatron_dapo.errors import UserError


def raise_file_limit(needed: int) -> None:
    """Raise this process's own limit to what it needs, as far as the system lets it. UserError if that is too
    few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    check_file_limit(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_file_limit(needed: int, hard: int | None = None) -> None:
    """UserError if the system's hard limit (default: this process's) on open files is below `needed`."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if hard is None else hard
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise UserError(
            f"rollout.engines and rollout.max_concurrency need up to {needed} open files, the limit is "
            f"{limit}; raise it (ulimit -n, where the run is started) or lower rollout.max_concurrency"
        )
