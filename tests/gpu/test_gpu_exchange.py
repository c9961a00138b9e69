"""A push through memory of GPUs and over NCCL puts the same bytes into every chunk as through memory of the
host and over gloo. `TEST_PYTHON=python bash tests/run.sh -m gpu`, where there are GPUs; without them memory
of the host and gloo stand for theirs in every test run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.ranks import run_ranks


def check(found: list[dict[str, Any]]) -> None:
    assert [of_rank["differ"] for of_rank in found] == [[]] * len(found)
    assert sum(of_rank["chunks"] for of_rank in found) > 10


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_gpus_and_nccl(count):
    if torch.cuda.device_count() < count:
        pytest.skip(f"torch sees {torch.cuda.device_count()} GPUs, not {count}")
    check(run_ranks("support.jobs_gpu_exchange:compare", count, on_cpu=False))


def test_the_comparison_itself_without_gpus():
    check(run_ranks("support.jobs_gpu_exchange:compare", 4, on_cpu=True))
