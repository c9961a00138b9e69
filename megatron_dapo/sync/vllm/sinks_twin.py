"""A meta twin of the model that an engine worker serves, to record what its loaders do."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_ep_group, get_pp_group, get_tp_group
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_tying import _get_untied_lm_head
from vllm.utils.torch_utils import set_default_torch_dtype

from megatron_dapo.sync.sinks import SinkTable
from megatron_dapo.sync.vllm.sinks_recorder import TensorFacts, record_sinks

ALLOCATORS = (torch.empty, torch.empty_strided, torch.zeros, torch.ones, torch.rand, torch.randn)


def bake_in_worker(model: torch.nn.Module, vllm_config: VllmConfig, tensors: TensorFacts) -> SinkTable:
    """The sink table of this worker, for a checkpoint of these Hugging Face tensors.

    model: the one that the worker serves; it is only looked at. To be called in vLLM's own parallel world.
    RuntimeError when the twin is not built like `model`.
    """
    twin = build_twin(vllm_config)
    _check_alike(twin, model)
    _tie_as(twin, model)
    return record_sinks(twin, tensors, ranks(vllm_config))


def build_twin(vllm_config: VllmConfig) -> torch.nn.Module:
    """The model as vLLM's loader finds it, but with its parameters on the meta device."""
    with MetaParameters():
        return build(vllm_config)


def build(vllm_config: VllmConfig) -> torch.nn.Module:
    """The model as vLLM's loader finds it. What a model registers by name (attention layers, rotary tables)
    stays apart from that of a live model.
    """
    config, compilation = copy.copy(vllm_config), copy.copy(vllm_config.compilation_config)
    config.compilation_config = compilation
    compilation.mode = CompilationMode.NONE  # it is never run
    compilation.static_forward_context, compilation.static_all_moe_layers = {}, []
    compilation.enabled_custom_ops = copy.copy(compilation.enabled_custom_ops)
    compilation.disabled_custom_ops = copy.copy(compilation.disabled_custom_ops)
    with (
        mock.patch.dict(rotary_embedding._ROPE_DICT, clear=True),
        set_default_torch_dtype(config.model_config.dtype),
        torch.device(config.device_config.device or "cpu"),
    ):
        return initialize_model(config)


class MetaParameters(TorchFunctionMode):
    """Allocates floating tensors on the meta device. What is computed (rotary tables) or read back (integers:
    expert maps) stays real.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in ALLOCATORS and (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def ranks(vllm_config: VllmConfig) -> dict[str, int]:
    """Where this worker stands in its engine, as the fields of SinkTable."""
    groups = {"tp": get_tp_group(), "pp": get_pp_group()}
    if vllm_config.parallel_config.enable_expert_parallel and vllm_config.model_config.is_moe:
        groups["ep"] = get_ep_group()
    sizes = {kind: group.world_size for kind, group in groups.items()}
    return sizes | {f"{kind}_rank": group.rank_in_group for kind, group in groups.items()}


def _check_alike(twin: torch.nn.Module, model: torch.nn.Module) -> None:
    expected, found = _as_built(model), _as_built(twin)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise RuntimeError(
                f"parameter {name} is {expected.get(name)} in the model and {found.get(name)} in its meta "
                f"twin; sink tables need a model that vLLM builds alike twice"
            )


def _tie_as(twin: torch.nn.Module, model: torch.nn.Module) -> None:
    """Tie the twin's head if vLLM has tied the model's after loading, since both tensors were the same."""
    pair, live = _get_untied_lm_head(twin), _get_untied_lm_head(model)
    if pair is not None and live is not None and live.lm_head.weight is live.embed_tokens.weight:
        pair.tie(twin)


def _as_built(model: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the parameters as vLLM noted them when it built the model, before any repacking."""
    return {
        f"{name}.{key}": (tuple(noted.shape), noted.dtype)
        for name, layer in model.named_modules()
        for key, noted in get_layerwise_info(layer).restore_metadata[0].items()
    }
