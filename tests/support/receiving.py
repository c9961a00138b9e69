"""A weight receiver in this process: vLLM's model as its own loader leaves it, on one rank of a pretended
engine.

Only loading runs, no request: what kernels have packed is compared by the products that they compute.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dapo.environment import DIGEST_VARIABLE, PLUGIN
from megatron_dapo.sync.manifest import Manifest
from megatron_dapo.sync.plan import Plan
from megatron_dapo.sync.sinks import SinkTable
from support.models import make_tiny_model
from support.push import CHUNK_BYTES, dtype_of, halves, one_rank_plan, staged


def make_two(folder: Path, arch: Any, tied: bool) -> list[Path]:
    """Checkpoints of the same model. Its vocabulary is padded in the engine."""
    return [make_tiny_model(folder / str(seed), arch=arch, tied=tied, ffn=64, seed=seed) for seed in (1, 2)]


class Worker:
    """What the extension needs of vLLM's worker. `model`: of the checkpoint in the folder, loaded by vLLM.

    To be used inside `worker`, where the digests of what it loads are written into `digests`.
    """

    def __init__(self, vllm_config: Any, digests: Path) -> None:
        from vllm.config.weight_transfer import WeightTransferConfig

        from megatron_dapo.sync.vllm.digest import DigestLoader
        from megatron_dapo.sync.vllm.receiver import WeightReceiver

        self.vllm_config, self.digests = vllm_config, digests
        self.model = DigestLoader(vllm_config.load_config).load_model(
            vllm_config=vllm_config, model_config=vllm_config.model_config
        )
        self.weight_transfer_engine = self.receiver = WeightReceiver(
            WeightTransferConfig(backend=PLUGIN), vllm_config, torch.device("cpu"), self.model
        )
        self.rank = vllm_config.parallel_config.rank

    def _check_weight_transfer_engine(self) -> None:
        pass

    def sink_table(self, tensors: Mapping[str, torch.Tensor]) -> SinkTable:
        from megatron_dapo.sync.vllm.extension import WorkerExtension

        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        answer = WorkerExtension.megatron_dapo_sink_table(self, shapes, dtype_of(tensors))  # type: ignore
        return SinkTable.from_json(json.loads(json.dumps(answer)))

    def plan(self, tensors: Mapping[str, torch.Tensor], chunk_bytes: int = CHUNK_BYTES) -> Plan:
        """For this worker alone."""
        return one_rank_plan([self.sink_table(tensors)], halves(tensors), dtype_of(tensors), chunk_bytes)

    def push(self, plan: Plan, tensors: Mapping[str, torch.Tensor], version: int, **options: Any) -> None:
        """options: those of `send`."""
        self.receiver.start_weight_update()
        self.send(plan, tensors, version, **options)
        self.receiver.finish_weight_update()

    def send(
        self,
        plan: Plan,
        tensors: Mapping[str, torch.Tensor],
        version: int,
        *,
        brief: bool = False,
        **options: Any,
    ) -> None:
        """brief: the worker knows the pieces of all chunks. options: of `staged`."""
        for [manifest] in staged(plan, tensors, version, **options):
            self.receive(manifest.brief() if brief else manifest)

    def receive(self, manifest: Manifest) -> None:
        self.receiver.update_weights(json.loads(json.dumps(manifest.to_json())))

    def as_loaded(self, label: str) -> dict[str, str]:
        """The digests of a label: load, or v and a version."""
        from vllm.distributed import get_tensor_model_parallel_rank

        return json.loads((self.digests / f"tp{get_tensor_model_parallel_rank()}-{label}.json").read_text())


@contextlib.contextmanager
def worker(folder: Path, digests: Path, rank: int = 0, **options: Any) -> Iterator[Worker]:
    """Rank `rank` of a pretended engine. options: of its configuration; it computes in fp32 by default."""
    from megatron_dapo.sync.vllm import sinks_pretend

    options.setdefault("dtype", "float32")
    config = sinks_pretend.engine_config(folder, **options)
    with sinks_pretend.pretend(config, rank), pytest.MonkeyPatch.context() as patch:
        patch.setenv(DIGEST_VARIABLE, str(digests))
        for name in ("empty_cache", "synchronize"):  # as vLLM's CPU worker does
            patch.setattr(torch.accelerator, name, lambda *_: None)
        yield Worker(config, digests)


def computed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the kernels hold: all tensors of the model, and products with the packed weights of its layers."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    dtype = found["model.norm.weight"].dtype
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase | VocabParallelEmbedding):
            layer: Any
            sizes = ("input_size_per_partition", "input_size", "embedding_dim")
            width = next(getattr(layer, size) for size in sizes if hasattr(layer, size))
            values = torch.linspace(-1, 1, 3 * width).view(3, width).to(dtype)
            found[f"{name} applied"] = layer.quant_method.apply(layer, values)
    return found


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of tensors that are not equal in every bit, or that only one of them has."""
    return {
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(bits(one[name]), bits(other[name]))
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
