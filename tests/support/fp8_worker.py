"""Imported into a vLLM worker, by `--worker-extension-cls support.fp8_worker.Extension`: has it compute with
models in block FP8 on a CPU without AMX. vLLM's CPU kernels ask for AMX, but need only AVX-512.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8

from megatron_dapo.sync.vllm.extension import WorkerExtension


class Extension(WorkerExtension):
    """Adds nothing to the worker: that it is imported there is enough."""


def is_supported(*_: Any) -> tuple[bool, None]:
    return True, None


CPUFp8BlockScaledMMKernel.is_supported = is_supported  # type: ignore[method-assign]
CPUExpertsFp8._supports_current_device = staticmethod(lambda: True)  # type: ignore[method-assign]
