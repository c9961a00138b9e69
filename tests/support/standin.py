"""The GPU path without a GPU: jobs of ranks (support/ranks.py) whose Megatron-Core finds the stand-in of
TransformerEngine and whose CUDA devices are pretended (support/pretend_cuda.py).

Whether TransformerEngine imports decides at import time what Megatron-Core is: the stand-in is found by
processes that are started for it alone, and by nobody else, because its folder is on no other sys.path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from support import ranks

STAND_IN = Path(__file__).parent / "te_standin"
Job = tuple[str, dict[str, Any]]  # module:function, and its arguments


@contextmanager
def environment() -> Iterator[None]:
    """Processes started meanwhile import the stand-in, and compile nothing."""
    path = os.pathsep.join(filter(None, [str(STAND_IN), os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, PYTHONPATH=path, TORCH_COMPILE_DISABLE="1"):
        yield


def run_ranks(job: str, world: int, *, timeout_s: float = 240, **arguments: Any) -> list[Any]:
    """As support.ranks.run_ranks, with the GPU's branch of the policy under any job of support/jobs_*.py."""
    (results,) = run_in_turn([(job, arguments)], world, timeout_s=timeout_s)
    return results


def run_in_turn(jobs: Sequence[Job], world: int, *, timeout_s: float = 240) -> list[list[Any]]:
    """Several jobs in one launch: of each, the results by rank."""
    with environment():
        by_rank = ranks.run_ranks(
            "support.jobs_standin:on_gpu_path", world, timeout_s=timeout_s, jobs=[list(job) for job in jobs]
        )
    return [list(results) for results in zip(*by_rank, strict=True)]
