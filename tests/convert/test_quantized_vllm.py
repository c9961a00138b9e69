"""Quantised exports as vLLM reads them: its classes for the configuration, the method of each layer, and its
loaders into parameters of their own shapes and types. Kernels are not asked for: most need a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.convert_runs import weights
from support.quantised import CASES, Exports
from support.sink_models import bits

METHODS = {
    "fp8": ("ModelOptLinearMethod", "ModelOptFp8MoEMethod"),
    "fp8_block": ("Fp8LinearMethod", "Fp8MoEMethod"),
    "nvfp4": ("ModelOptLinearMethod", "ModelOptNvFp4FusedMoE"),
    "int4_awq": ("CompressedTensorsLinearMethod", ""),
}
CONFIGS = {
    "fp8": "ModelOptFp8Config",
    "fp8_block": "Fp8Config",
    "nvfp4": "ModelOptNvFp4Config",
    "int4_awq": "CompressedTensorsConfig",
}
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}


@contextlib.contextmanager
def built(folder: Path) -> Iterator[tuple[Any, Any]]:
    """vLLM's configuration of an engine for the folder, and its model without values."""
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16

    from megatron_dapo.sync.vllm import sinks_pretend
    from megatron_dapo.sync.vllm.sinks_twin import build

    config = sinks_pretend.engine_config(folder)
    kernel = mock.Mock(__name__="none")
    with (
        sinks_pretend.pretend(config, 0),
        sinks_pretend.without_fp8_kernels(),
        mock.patch.object(modelopt, "select_linear_kernel"),
        mock.patch.object(modelopt, "expose_input_quant_key"),
        mock.patch.object(modelopt, "select_fp8_moe_backend", return_value=(None, None)),
        mock.patch.object(modelopt, "select_nvfp4_moe_backend", return_value=(None, None)),
        mock.patch.object(modelopt, "is_global_sf_supported_for_nvfp4_backend", return_value=False),
        mock.patch.object(compressed_tensors_wNa16, "choose_mp_linear_kernel", return_value=kernel),
    ):
        yield config, build(config)


@pytest.mark.parametrize(("arch", "scheme"), CASES)
def test_every_layer_has_its_method_and_every_tensor_its_place(exports: Exports, arch, scheme):
    folder = exports.made(arch, scheme).out
    tensors = weights(folder)
    with built(folder) as (config, model):
        assert type(config.quant_config).__name__ == CONFIGS[scheme]
        methods = {name: type(m.quant_method).__name__ for name, m in model.named_modules() if has_method(m)}
        parameters = {name: p.data for name, p in model.named_parameters() if ".attn." not in name}
        for values in parameters.values():
            bits(values).fill_(0xAA)
        model.load_weights(iter(tensors.items()))
    linear, experts = METHODS[scheme]
    for name, method in methods.items():
        if name.endswith(("embed_tokens", "lm_head", "mlp.gate")):
            assert method.startswith("Unquantized"), name
        else:
            assert method == (experts if name.endswith("routed_experts") else linear), name
    read: set[str] = set()
    for name, values in parameters.items():
        expected, names = parts_of(name, tensors, values.shape)
        assert {tensors[part].dtype for part in names} == {values.dtype}, name
        assert torch.equal(bits(values), bits(expected)), name
        read |= set(names)
    assert read == set(tensors)


def has_method(module: torch.nn.Module) -> bool:
    """Of weights: attention has one for its cache."""
    return "CacheMethod" not in type(getattr(module, "quant_method", None)).__name__ and bool(
        getattr(module, "quant_method", None)
    )


def parts_of(
    name: str, tensors: dict[str, torch.Tensor], shape: torch.Size
) -> tuple[torch.Tensor, list[str]]:
    """What vLLM's parameter must hold, and the checkpoint's tensors that it is made of."""
    layer, kind = name.rsplit(".", 1)
    module = layer.rsplit(".", 1)[-1]
    if module == "routed_experts":
        group, kind = kind.split("_", 1)
        prefix = layer.removesuffix("routed_experts")
        names = [f"{prefix}{e}.{part}.{kind}" for e in range(shape[0]) for part in EXPERTS[group]]
    elif module in STACKED:
        names = [f"{layer.removesuffix(module)}{part}.{kind}" for part in STACKED[module]]
    else:
        names = [name]
    found = [tensors[part] for part in names]
    if kind == "weight_shape":  # of the part that came last; no kernel looks at it
        return found[-1], names
    if module in ("embed_tokens", "lm_head"):  # padded with zeros
        found.append(torch.zeros(shape[0] - len(found[0]), shape[1], dtype=found[0].dtype))
    expected = torch.cat([values if values.dim() else values.view(1) for values in found])
    if kind == "input_scale" and expected.numel() == 2 * shape.numel():  # gate and up have the same input
        first, second = expected.view(-1, 2).T
        assert torch.equal(first, second)
        return first.contiguous(), names
    return expected, names
