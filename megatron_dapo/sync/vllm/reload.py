"""What a weight update must know of vLLM's layerwise reload.

vLLM keeps the arguments of a layer's loaders until all elements of the layer have arrived, then loads it and
repacks it for its kernels. The functions here see to what that leaves open: layers that got too little,
layers that share a parameter, kernels that packed their weights for good, an update that was given up.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel


def abandon_update(model: torch.nn.Module) -> None:
    """Forget an update that was not finished, so that the next cannot complete its half-filled layers."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            _place_kernel_tensors(layer, info)
            info.reset()


def forget_packed_experts(model: torch.nn.Module) -> None:
    """Have experts packed again after this update. (On a CPU vLLM packs them only when it makes their kernel;
    later weights would stay unpacked and be misread.)
    """
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def copy_waiting_tensors(model: torch.nn.Module, memory: mmap.mmap) -> None:
    """Copy what incomplete layers keep of the chunk in `memory`, which the trainer is about to overwrite."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        first = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    for layer in model.modules():
        for _, call in get_layerwise_info(layer).loaded_weights:
            for name, value in call.arguments.items():
                if not isinstance(value, torch.Tensor):
                    continue
                if first <= value.untyped_storage().data_ptr() < first + len(memory):
                    call.arguments[name] = value.clone()


def tied_layers(model: torch.nn.Module) -> list[Any]:
    """Layers that received nothing since all their parameters belong to one that did (a tied lm_head)."""
    loaded: set[int] = set()
    idle: list[tuple[torch.nn.Module, Mapping[str, torch.Tensor]]] = []
    for layer in model.modules():
        info = get_layerwise_info(layer)
        waits = info.can_load()
        if waits and info.kernel_tensors:
            parameters = info.kernel_tensors[0]
        else:
            parameters = dict(layer.named_parameters(recurse=False))
        if waits and info.load_numel == 0:
            idle.append((layer, parameters))
        else:
            loaded.update(map(id, parameters.values()))
    return [
        layer
        for layer, parameters in idle
        if parameters and all(id(parameter) in loaded for parameter in parameters.values())
    ]


def missing_parameters(model: torch.nn.Module, tied: Sequence[torch.nn.Module]) -> list[str]:
    """One line for every layer that did not get all elements of its parameters.

    To be called before the reload is finalized. vLLM finalizes a layer as soon as enough elements have
    arrived, and no tensor arrives twice, so only layers that still wait are looked at.
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
