"""The receiving end of a weight update, inside each vLLM worker.

Buckets of Hugging Face tensors arrive in memory shared with the trainer (bridge/transfer.py). vLLM's own loader takes what its
shard needs from each, inside vLLM's layerwise reload, so it also works where vLLM repacks weights (CPU kernels, FP8).
"""

from __future__ import annotations

import math
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel
from vllm.platforms import current_platform

from megatron_dapo.bridge.vllm_digest import UpdateDigests
from megatron_dapo.bridge.vllm_plugin import DIGEST_VARIABLE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES_IN_ERRORS = 10


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing is agreed beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One bucket: a file to map, and [name, dtype, shape, byte offset] of every tensor in it."""

    path: str
    tensors: list[Any]
    version: int


class SharedMemoryEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """start -> receive bucket after bucket -> finish. After an error, start again with all buckets."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False
    _digests: UpdateDigests | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self._abandon()
        self._received: set[str] = set()
        self._version: int | None = None
        if os.environ.get(DIGEST_VARIABLE):
            self._digests = UpdateDigests(self.model)
        initialize_layerwise_reload(self.model)
        if current_platform.is_cpu():
            forget_packed_experts(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load one bucket; afterwards nothing refers to its memory, which the trainer fills anew.

        ValueError for a tensor sent twice, a version that changes within an update, or a name the model does not know.
        """
        if self._version not in (None, update_info.version):
            raise ValueError(f"weight update {self._version} received a bucket of version {update_info.version}")
        names = [row[0] for row in update_info.tensors]
        if repeated := sorted(name for i, name in enumerate(names) if name in self._received or name in names[:i]):
            raise ValueError(f"weight update {update_info.version} received tensors twice: {repeated[:NAMES_IN_ERRORS]}")
        self._version = update_info.version
        self._received.update(names)
        with open(update_info.path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        model: Any = self.model
        model.load_weights(views(memory, update_info.tensors))
        own_waiting_tensors(self.model, memory)

    def finish_weight_update(self) -> None:
        """Put the update into use. RuntimeError naming what is missing; more buckets may follow then, and another finish."""
        tied = tied_layers(self.model)
        if missing := missing_parameters(self.model, tied):
            more = f" and {len(missing) - NAMES_IN_ERRORS} more" if len(missing) > NAMES_IN_ERRORS else ""
            raise RuntimeError(f"weight update {self._version} is incomplete: {'; '.join(missing[:NAMES_IN_ERRORS])}{more}")
        finalize_layerwise_reload(self.model, self.model_config)
        digests, self._digests = self._digests, None
        if digests:
            digests.detach()
        for layer in tied:
            # vLLM reloads only one of the layers that share a parameter; the other keeps what it packed from the old one.
            layer.quant_method.process_weights_after_loading(layer)
        if digests and self._version is not None:
            digests.write(self._version)

    def shutdown(self) -> None:
        pass

    def _abandon(self) -> None:
        """Forget an update that was not finished, so that its half-filled layers cannot complete with parts of the next."""
        if self._digests:
            self._digests.detach()
            self._digests = None
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                _place_kernel_tensors(layer, info)
                info.reset()


def forget_packed_experts(model: torch.nn.Module) -> None:
    """vLLM packs experts for its CPU kernel only when it makes that kernel: later weights would be left unpacked, and misread."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def views(memory: mmap.mmap, rows: Sequence[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The bucket's tensors, without a copy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        for name, dtype, shape, offset in rows:
            yield name, torch.frombuffer(memory, dtype=DTYPES[dtype], count=math.prod(shape), offset=offset).view(shape)


def own_waiting_tensors(model: torch.nn.Module, memory: mmap.mmap) -> None:
    """Copy what layers that are not complete yet still hold of the bucket (vLLM keeps the loader's arguments till then)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        first = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    for layer in model.modules():
        for _, call in get_layerwise_info(layer).loaded_weights:
            for name, value in call.arguments.items():
                if isinstance(value, torch.Tensor) and first <= value.untyped_storage().data_ptr() < first + len(memory):
                    call.arguments[name] = value.clone()


def tied_layers(model: torch.nn.Module) -> list[Any]:
    """Layers that received nothing because all their parameters belong to another layer that did (a tied lm_head)."""
    loaded: set[int] = set()
    idle: list[tuple[torch.nn.Module, Mapping[str, torch.Tensor]]] = []
    for layer in model.modules():
        info = get_layerwise_info(layer)
        parameters = (
            info.kernel_tensors[0] if info.can_load() and info.kernel_tensors else dict(layer.named_parameters(recurse=False))
        )
        if info.can_load() and info.load_numel == 0:
            idle.append((layer, parameters))
        else:
            loaded.update(map(id, parameters.values()))
    return [layer for layer, parameters in idle if parameters and all(id(p) in loaded for p in parameters.values())]


def missing_parameters(model: torch.nn.Module, tied: Sequence[torch.nn.Module]) -> list[str]:
    """One line for every layer that did not get all elements of its parameters. Valid before the reload is finalized.

    vLLM finalizes a layer as soon as enough elements arrived, and no tensor arrives twice, so only the others are looked at.
    """
    lines = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        parameters = dict(layer.named_parameters(recurse=False))
        if not parameters or not info.can_load() or is_deferred_attention_layer(layer) or layer in tied:
            continue
        expected = sum(get_tensor_load_numel(parameter) for parameter in parameters.values())
        if isinstance(layer, VocabParallelEmbedding):  # rows that pad the vocabulary are never sent
            padding = layer.num_embeddings_per_partition - layer.shard_indices.num_org_elements
            expected -= sum(padding * math.prod(parameter.shape[1:]) for parameter in parameters.values())
        if info.load_numel < expected:
            full_names = ", ".join(f"{name}.{parameter}" for parameter in parameters)
            lines.append(f"{full_names} got {info.load_numel} of {expected} elements")
    return lines
