"""What vLLM adds to its worker class with `--worker-extension-cls` (environment.py: WORKER_EXTENSION)."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import set_current_vllm_config

from megatron_dapo.sync.vllm.sinks_twin import bake_in_worker


class WorkerExtension:
    """Methods for vLLM's `/collective_rpc`, which answers with a list of every worker's result."""

    def megatron_dapo_sink_table(self, shapes: dict[str, list[int]], dtype: str) -> dict[str, Any]:
        """SinkTable.to_json of this worker, for a checkpoint of these Hugging Face tensors; its receiver
        loads by that table from the next update on. dtype: as in torch without "torch.".
        """
        worker: Any = self
        worker._check_weight_transfer_engine()
        receiver = worker.weight_transfer_engine
        facts = {name: (tuple(shape), getattr(torch, dtype)) for name, shape in shapes.items()}
        with set_current_vllm_config(worker.vllm_config):
            table = bake_in_worker(receiver.model, worker.vllm_config, facts)
        receiver.use_table(table, {name: facts[name][0] for name in table.whole})
        return table.to_json()
