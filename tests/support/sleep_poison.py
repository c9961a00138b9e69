"""Loaded into a run's engines by `--worker-extension-cls sleep_poison.Extension`: a CPU worker gives nothing
back when it falls asleep, so here it forgets its weights as a GPU worker does: they become NaN. (Those that
vLLM has repacked cannot be reached: their parameters are empty.)

DAPO_TEST_WAKE_FAULT="ENGINE FILE": the first time that this engine is to wake up it has too little memory.
FILE is made then.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from megatron_dapo.environment import ENGINE_VARIABLE
from megatron_dapo.sync.vllm.extension import WorkerExtension

FAULT = "DAPO_TEST_WAKE_FAULT"


class Extension(WorkerExtension):
    """Adds nothing to the worker: that it is imported there is enough."""


@torch.no_grad()
def forget(self: Any, level: int = 1) -> None:
    assert level == 2
    elements = 0
    for parameter in self.model_runner.model.parameters():
        elements += parameter.numel()
        parameter.fill_(float("nan"))
    print(f"forgot {elements} elements", flush=True)


def wake_up(self: Any, tags: list[str] | None = None) -> None:
    engine, file = os.environ.get(FAULT, "- -").split(" ", 1)
    if engine == os.environ.get(ENGINE_VARIABLE) and not Path(file).exists():
        Path(file).touch()
        raise torch.OutOfMemoryError("CUDA out of memory")


CPUWorker.sleep, CPUWorker.wake_up = forget, wake_up  # type: ignore[method-assign]
