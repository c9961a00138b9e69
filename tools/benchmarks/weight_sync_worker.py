"""What the benchmark of weight pushes adds to vLLM's workers (--worker-extension-cls)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.model_executor.model_loader.reload import layerwise

from benchmarks.resources import memory, reset_peak
from benchmarks.weight_sync_tables import whole_table
from megatron_dapo.sync.sinks import SinkTable
from megatron_dapo.sync.vllm.extension import WorkerExtension

REPACK = "process_weights_after_loading"
_seconds: dict[str, float] = defaultdict(float)  # of this worker, since the push began
_open: set[str] = set()  # what is being timed now; calls inside it are part of it


class BenchmarkExtension(WorkerExtension):
    benchmark_whole = False  # whether this worker says that it needs all tensors whole
    benchmark_resident = 0  # bytes, when the push began

    def megatron_dapo_sink_table(self, shapes: dict[str, list[int]], dtype: str) -> dict[str, Any]:
        answer = super().megatron_dapo_sink_table(shapes, dtype)
        if not self.benchmark_whole:
            return answer
        worker: Any = self
        table = whole_table(SinkTable.from_json(answer), shapes)
        worker.weight_transfer_engine.use_table(table, {name: tuple(size) for name, size in shapes.items()})
        return table.to_json()

    def benchmark_vllm_loads(self) -> None:
        """From now on vLLM's own loaders load, all tensors whole."""
        self.benchmark_whole = True

    def benchmark_begin(self) -> None:
        """A push begins: seconds and peak memory are counted from here on."""
        worker: Any = self
        model = worker.model_runner.get_model()
        if not hasattr(layerwise._copy_and_restore_kernel_tensors, "__wrapped__"):
            _time(layerwise, "_copy_and_restore_kernel_tensors", "kernel_copy_seconds")
        for layer in model.modules():
            for owner in (type(layer), type(getattr(layer, "quant_method", None))):
                if hasattr(owner, REPACK) and not hasattr(getattr(owner, REPACK), "__wrapped__"):
                    _time(owner, REPACK, "repack_seconds")
        _seconds.clear()
        self.benchmark_resident = reset_peak() - memory("RssShmem")

    def benchmark_end(self) -> dict[str, float]:
        """Seconds in vLLM's repacking and in its copies of repacked weights to where its kernels expect them;
        the most bytes that were resident over those when the push began, which count without memory that
        processes share: chunks stay mapped from push to push.
        """
        return {
            "repack_seconds": _seconds["repack_seconds"],
            "kernel_copy_seconds": _seconds["kernel_copy_seconds"],
            "peak_extra_bytes": memory("VmHWM") - self.benchmark_resident,
        }


def _time(owner: Any, name: str, key: str) -> None:
    """Add what calls of this function take to `_seconds[key]`."""
    function: Callable[..., Any] = getattr(owner, name)

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if key in _open:
            return function(*args, **kwargs)
        _open.add(key)
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            _seconds[key] += time.perf_counter() - began
            _open.discard(key)

    setattr(owner, name, timed)
