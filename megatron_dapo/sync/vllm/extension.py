"""What vLLM adds to its worker class with `--worker-extension-cls` (environment.py: WORKER_EXTENSION)."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention.attention import set_default_quant_scales
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from megatron_dapo.sync.vllm.sinks_twin import bake_in_worker
from megatron_dapo.weights.block_fp8 import checkpoint_facts


class WorkerExtension:
    """Methods for vLLM's `/collective_rpc`, which answers with a list of every worker's result."""

    def megatron_dapo_sink_table(self, shapes: dict[str, list[int]], dtype: str) -> dict[str, Any]:
        """SinkTable.to_json of this worker, for a checkpoint of these Hugging Face tensors; its receiver
        loads by that table from the next update on. dtype: as in torch without "torch.", of those that are
        not in block FP8 (weights/block_fp8.py).
        """
        worker: Any = self
        worker._check_weight_transfer_engine()
        receiver = worker.weight_transfer_engine
        facts = checkpoint_facts({n: tuple(shape) for n, shape in shapes.items()}, getattr(torch, dtype))
        with set_current_vllm_config(worker.vllm_config):
            table = bake_in_worker(receiver.model, worker.vllm_config, facts)
        default_cache_scales(receiver.model)
        receiver.use_table(table, {name: facts[name][0] for name in table.whole})
        return table.to_json()


def default_cache_scales(model: torch.nn.Module) -> None:
    """Scales of a quantised cache are 1 where no checkpoint brings others; vLLM's dummy weights
    (rollout.load_format) leave small numbers in those of models in FP8.
    """
    for layer in model.modules():
        if isinstance(getattr(layer, "quant_method", None), BaseKVCacheMethod):
            set_default_quant_scales(layer)
