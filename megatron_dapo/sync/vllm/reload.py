"""What a weight update must know of vLLM's layerwise reload.

vLLM waits until all elements of a layer have arrived, then repacks it for its kernels. Here is what fills
layers by the rows of a sink table, and what its reload leaves open: layers that got too little, layers that
share a parameter, kernels that packed their weights for good, an update that was given up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    _layerwise_process,
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
from vllm.model_executor.model_loader.reload.utils import get_layer_size, get_tensor_load_numel
from vllm.platforms import current_platform

from megatron_dapo.sync.regions import Region, row_major
from megatron_dapo.sync.sinks import Padding, Sink, SinkTable

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class RowLoader:
    """Writes the rows of a sink table into a model in a reload that has begun, those of a chunk at once. A
    layer is repacked as soon as all elements of its parameters are there.

    RuntimeError when vLLM would wait for another number of elements than the table has of a parameter.
    """

    def __init__(self, model: torch.nn.Module, table: SinkTable) -> None:
        self._places: dict[str, tuple[torch.nn.Module, str]] = {}  # the layer of a parameter, its name there
        self._totals = Counter[torch.nn.Module]()  # elements of a layer that the table has
        # vLLM's kernels for a CPU keep packed copies of weights; zentorch's keep the weights
        self._lends = current_platform.is_cpu() and not current_platform.is_zen_cpu()
        totals = Counter[str]()
        for row in (*table.sinks, *table.padding):
            totals[row.parameter] += math.prod(row.size)
        for name, total in totals.items():
            module, _, leaf = name.rpartition(".")
            layer = model.get_submodule(module)
            if (expected := get_tensor_load_numel(getattr(layer, leaf))) != total:
                raise RuntimeError(
                    f"the sink table has {total} elements of {name}, of which vLLM loads {expected}"
                )
            assert not is_deferred_attention_layer(layer), "vLLM loads the scales of a cache in another way"
            self._places[name] = layer, leaf
            self._totals[layer] += total
        for padding in table.padding:
            value = torch.tensor(padding.value, dtype=getattr(torch, table.dtypes[padding.parameter]))
            self._load(padding, value.expand(padding.size), verify=False, lent=False)

    def load(self, rows: Sequence[tuple[Sink, torch.Tensor]], *, verify: bool) -> None:
        """Rows with their values, views of a chunk's memory, which nobody reads after this call. verify: look
        whether they are where the rows say; ValueError if not.
        """
        lent = self._lend(rows) if self._lends else ()
        for row, values in rows:
            self._load(row, values, verify=verify, lent=row.parameter in lent)

    def _lend(self, rows: Sequence[tuple[Sink, torch.Tensor]]) -> set[str]:
        """Have weights that are about to be repacked read where they lie in the chunk, which saves a copy.
        Returned are the names of these parameters.

        Their layers must be complete with these rows, and be of a kind that keeps nothing but a packed copy.
        """
        numbers = Counter[torch.nn.Module]()
        starts: dict[str, set[int | None]] = {}  # in the chunk, by what each row says; None: out of order
        memory: dict[str, torch.Tensor] = {}
        for row, values in rows:
            numbers[self._places[row.parameter][0]] += values.numel()
            in_order = row.stride == row_major(row.size)
            start = int(values.storage_offset()) - row.offset if in_order else None
            starts.setdefault(row.parameter, set()).add(start)
            memory[row.parameter] = values
        lent = set[str]()
        for name, (start, *others) in starts.items():
            layer, leaf = self._places[name]
            complete = numbers[layer] == self._totals[layer]
            if start is not None and not others and complete and _is_only_packed(layer, leaf):
                meta = getattr(layer, leaf)
                setattr(layer, leaf, _like(meta, memory[name].as_strided(meta.shape, meta.stride(), start)))
                lent.add(name)
        return lent

    def _load(self, row: Sink | Padding, values: torch.Tensor, *, verify: bool, lent: bool) -> None:
        layer, leaf = self._places[row.parameter]
        info = get_layerwise_info(layer)
        if getattr(layer, leaf).is_meta:
            materialize(layer, info)
        param = getattr(layer, leaf)
        if not lent:
            write(param, row.region, values)
        if verify:
            written = _elements(param, row.region).cpu()
            sent, bits = values.cpu().to(written.dtype), BITS[written.itemsize]
            if not torch.equal(written.view(bits), sent.view(bits)):
                raise ValueError(f"{row.parameter} does not hold what was sent for it at {row.region}")
        info.load_numel += values.numel()
        if info.load_numel >= self._totals[layer]:
            info.load_numel_total = get_layer_size(layer)  # as vLLM does: a layer may get its bias late
            if info.load_numel >= info.load_numel_total:
                _layerwise_process(layer, info)


def write(param: torch.Tensor, region: Region, values: torch.Tensor) -> None:
    _elements(param, region).copy_(values)


def _elements(param: torch.Tensor, region: Region) -> torch.Tensor:
    return param.data.as_strided(region.size, region.stride, param.storage_offset() + region.offset)


def materialize(layer: torch.nn.Module, info: LayerReloadingInfo) -> None:
    """Memory for the parameters of a layer that are on the meta device. Where the kernels use a parameter as
    it is loaded, their own memory is written to; that saves a copy, and fresh memory, which costs more than
    the copy.
    """
    kernel_parameters, _ = info.kernel_tensors or ({}, {})
    for name, parameter in layer.named_parameters(recurse=False):
        kernel = kernel_parameters.get(name)
        if parameter.is_meta and kernel is not None and _are_alike(parameter, kernel):
            setattr(layer, name, _like(parameter, kernel.data))
    if any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
        materialize_layer(layer, info)


def _is_only_packed(layer: torch.nn.Module, leaf: str) -> bool:
    """Whether the parameter waits for its values, and vLLM's kernel for a CPU keeps a packed copy of them."""
    method, kernels = getattr(layer, "quant_method", None), get_layerwise_info(layer).kernel_tensors
    kernel = kernels[0].get(leaf) if kernels else None
    return (
        isinstance(method, UnquantizedLinearMethod)
        and getattr(layer, leaf).is_meta
        and getattr(layer, leaf).is_contiguous()
        and kernel is not None
        and kernel.numel() == 0
    )


def _like(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A parameter of the same kind, with these values."""
    values.__class__, values.__dict__ = parameter.__class__, dict(parameter.__dict__)
    return values


def _are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype


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
