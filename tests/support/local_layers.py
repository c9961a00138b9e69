"""The policy's GPU branch without TransformerEngine: on devices named cuda that are the CPU
(support/pretend_cuda.py), or on GPUs.
"""

from __future__ import annotations

import importlib
import os
from typing import Any
from unittest import mock

from support import ranks


def run_ranks(job: str, world: int, *, timeout_s: float = 240, **arguments: Any) -> list[Any]:
    """As support.ranks.run_ranks, with the GPU's backend for jobs that ask for the CPU's; nothing is
    compiled.
    """
    with mock.patch.dict(os.environ, TORCH_COMPILE_DISABLE="1"):
        return ranks.run_ranks(
            "support.local_layers:pretend", world, timeout_s=timeout_s, inner=job, arguments=arguments
        )


def run_ranks_on_gpus(job: str, world: int, *, timeout_s: float = 240, **arguments: Any) -> list[Any]:
    """As `run_ranks`, a GPU for each rank."""
    return ranks.run_ranks(
        "support.local_layers:on_gpu", world, timeout_s=timeout_s, inner=job, arguments=arguments
    )


def pretend(inner: str, arguments: dict[str, Any]) -> Any:
    """What a rank does for `run_ranks`."""
    from support import pretend_cuda

    pretend_cuda.install()
    return _with_gpu_backend(inner, arguments)


def on_gpu(inner: str, arguments: dict[str, Any]) -> Any:
    """What a rank does for `run_ranks_on_gpus`. Jobs start gloo, and take digests of tensors on the host."""
    import torch
    import torch.distributed as dist

    from support import jobs_policy

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    begin = dist.init_process_group
    with (
        mock.patch.object(dist, "init_process_group", lambda backend, **options: begin("nccl", **options)),
        mock.patch.object(jobs_policy, "digest", lambda policy: ""),
    ):
        return _with_gpu_backend(inner, arguments)


def _with_gpu_backend(inner: str, arguments: dict[str, Any]) -> Any:
    from megatron_dapo.policy import backend

    module, name = inner.split(":")
    with mock.patch.object(backend, "CPU", backend.GPU):
        return getattr(importlib.import_module(module), name)(**arguments)
