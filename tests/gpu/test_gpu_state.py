"""What a policy keeps beside its weights, on a GPU: it goes to the host while engines sample, and comes back;
a checkpoint is written in the background from pinned copies, also of what is away. All of it without changing
a bit. On the CPU backend the same job runs with every test run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.ranks import run_ranks


def check(digests: dict[str, str]) -> None:
    assert digests["returned"] == digests["later"] == digests["loaded away"]
    assert digests["loaded beside"] == digests["trained"]
    assert len({digests[name] for name in ("trained", "later", "much later")}) == 3


def measure(model: Any, folder: Any, *, on_cpu: bool) -> dict[str, Any]:
    arguments = {"model": str(model), "folder": str(folder), "on_cpu": on_cpu}
    (found,) = run_ranks("support.jobs_gpu:keep_state", 1, **arguments)
    return found


@pytest.mark.gpu
def test_state_leaves_the_gpu_and_returns(tiny_model, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    found = measure(tiny_model, tmp_path, on_cpu=False)
    check(found["digests"])
    gib = found["gib"]
    # fp32 gradients are gone, fp32 weights and both moments on the host: 16 of 18 bytes a parameter
    assert gib["away"] < gib["training"] - 2 * found["gradients"]
    assert gib["returned"] > gib["away"] + found["gradients"]


def test_the_job_itself_on_the_cpu_backend(tiny_model, tmp_path):
    check(measure(tiny_model, tmp_path, on_cpu=True)["digests"])
