"""What a weight update must know of vLLM's layerwise reload.

vLLM keeps the arguments of a layer's loaders until all elements of the layer have arrived, then loads it and
repacks it for its kernels. Here are the loader that it calls for the rows of a sink table, and what its
reload leaves open: layers that got too little, layers that share a parameter, kernels that packed their
weights for good, an update that was given up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    _place_kernel_tensors,
    _wrap_parameters_weight_loader,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

from megatron_dapo.sync.regions import Region
from megatron_dapo.sync.sinks import Padding, Sink, SinkTable

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


Loaders = list[tuple[torch.Tensor, Any]]  # tensors of a model and their weight_loader; None: vLLM's default


def take_rows(model: torch.nn.Module, table: SinkTable) -> Loaders:
    """Have the parameters in a reload that has begun filled by `load_row`, and give them their padding.
    Returns the loaders that they had, for `put_back`.

    RuntimeError when vLLM would wait for another number of elements than the table has of a parameter.
    """
    loaders: Loaders = []
    totals = Counter[str]()
    for row in (*table.sinks, *table.padding):
        totals[row.parameter] += math.prod(row.size)
    for name, total in totals.items():
        layer, tensor = _find(model, name)
        if (expected := get_tensor_load_numel(tensor)) != total:
            raise RuntimeError(
                f"the sink table has {total} elements of {name}, of which vLLM loads {expected}"
            )
        original = _get_original_loader(tensor) if hasattr(tensor, "weight_loader") else None
        loaders.append((tensor, original))
        tensor.weight_loader = load_row  # type: ignore[attr-defined]
        _wrap_parameters_weight_loader(layer)
    for padding in table.padding:
        value = torch.tensor(padding.value, dtype=getattr(torch, table.dtypes[padding.parameter]))
        give_row(model, padding, value.expand(padding.size), verify=False)
    return loaders


def put_back(loaders: Loaders) -> None:
    """Let vLLM load by itself again: the tensors that it notes for reloads, and biases, outlive an update."""
    for tensor, loader in loaders:
        if loader is None:
            vars(tensor).pop("weight_loader", None)
        else:
            tensor.weight_loader = loader  # type: ignore[attr-defined]


def give_row(model: torch.nn.Module, row: Sink | Padding, values: torch.Tensor, *, verify: bool) -> None:
    """Hand `values` to vLLM's reload, which writes them when their layer is complete. verify: look then
    whether they are where the row says; ValueError if not.
    """
    _, tensor = _find(model, row.parameter)
    tensor.weight_loader(tensor, values, row, verify)  # type: ignore[attr-defined]


def load_row(param: torch.Tensor, loaded_weight: torch.Tensor, row: Sink | Padding, verify: bool) -> None:
    """A loader as vLLM calls them, with the names that it knows: once to count the elements, on the meta
    device, and once to load them.
    """
    write(param, row.region, loaded_weight)
    if not verify or param.is_meta:
        return
    written = param.data.as_strided(row.size, row.stride, row.offset).cpu()
    bits = BITS[written.itemsize]
    if not torch.equal(written.view(bits), loaded_weight.cpu().view(bits)):
        raise ValueError(f"{row.parameter} does not hold what was sent for it at {row.region}")


def write(param: torch.Tensor, region: Region, values: torch.Tensor) -> None:
    param.data.as_strided(region.size, region.stride, region.offset).copy_(values)


def _find(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The layer that has the parameter or buffer `name`, and this as it is now."""
    module, _, leaf = name.rpartition(".")
    layer = model.get_submodule(module)
    return layer, getattr(layer, leaf)


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


def copy_waiting_tensors(model: torch.nn.Module, chunk: torch.Tensor) -> None:
    """Copy what incomplete layers keep of `chunk`, whose memory the trainer is about to overwrite."""
    shared = chunk.untyped_storage().data_ptr()
    for layer in model.modules():
        for _, call in get_layerwise_info(layer).loaded_weights:
            for name, value in call.arguments.items():
                if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == shared:
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
        if isinstance(layer, VocabParallelEmbedding):  # vLLM's loader does not count rows that it pads
            padding = layer.num_embeddings_per_partition - layer.shard_indices.num_org_elements
            expected -= sum(padding * math.prod(parameter.shape[1:]) for parameter in parameters.values())
        if info.load_numel < expected:
            full_names = ", ".join(f"{name}.{parameter}" for parameter in parameters)
            lines.append(f"{full_names} got {info.load_numel} of {expected} elements")
    return lines
