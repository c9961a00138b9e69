"""policy.fp8: what it means to Megatron, and which models, layouts, GPUs and software can do it.

Hardware and sizes are TransformerEngine's (pytorch/quantization.py of 2.9 to 2.19: `_compute_*_support`; its
page "Datatype and hardware support matrix"; for mxfp8 its page "MXFP8", data format) and Megatron-Core's
(fp8_utils.get_fp8_align_size).
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from megatron_dapo.config import Fp8Config, RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec

# Both sides of every weight shard, and the tokens of a micro-batch on each rank (an axis of the weight
# gradient's product), are multiples of these.
MULTIPLE = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
# Least compute capability, the first one it no longer works on, least CUDA
GPUS = {
    "tensorwise": ((8, 9), None, (12, 1)),
    "delayed": ((8, 9), None, (12, 1)),
    "blockwise": ((9, 0), None, (12, 9)),
    "mxfp8": ((10, 0), (12, 0), (12, 8)),
}
LEAST_TRANSFORMER_ENGINE = (
    2,
    3,
)  # the first with all four recipes (megatron-core's fp8_utils.get_fp8_recipe)


def transformer_fields(fp8: Fp8Config | None) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig."""
    if fp8 is None:
        return {}
    return dict(
        fp8=fp8.format,
        fp8_recipe=fp8.recipe,
        fp8_param=fp8.param_gather,
        first_last_layers_bf16=fp8.first_last_bf16,
        num_layers_at_start_in_bf16=1,
        num_layers_at_end_in_bf16=1,
    )


def ddp_fields(fp8: Fp8Config | None) -> dict[str, Any]:
    """Fields of Megatron's DistributedDataParallelConfig."""
    if fp8 is None:
        return {}
    return dict(
        fp8_param_gather=fp8.param_gather,
        reuse_grad_buf_for_mxfp8_param_ag=fp8.param_gather and fp8.recipe == "mxfp8",
    )


def with_whole_weights(config: RunConfig) -> RunConfig:
    """The configuration for a model whose weights are kept as they are and quantised as they are used."""
    if config.policy.fp8 is None:
        return config
    fp8 = config.policy.fp8.model_copy(update={"param_gather": False})
    return config.model_copy(update={"policy": config.policy.model_copy(update={"fp8": fp8})})


def optimizer_fields(fp8: Fp8Config | None) -> dict[str, Any]:
    """Fields of Megatron's OptimizerConfig."""
    if fp8 is None:
        return {}
    return dict(
        fp8_recipe=fp8.recipe, reuse_grad_buf_for_mxfp8_param_ag=fp8.param_gather and fp8.recipe == "mxfp8"
    )


def token_multiple(fp8: Fp8Config | None, layout: Layout) -> int:
    """What the tokens of a packed micro-batch are padded to; under sequence parallelism every rank's share of
    them is.
    """
    return (MULTIPLE[fp8.recipe] if fp8 else 1) * (layout.tp if layout.sp else 1)


def is_quantized(fp8: Fp8Config | None, layer: int, num_layers: int) -> bool:
    """Whether layer `layer` of the whole model (from 0) computes in FP8."""
    return fp8 is not None and not (fp8.first_last_bf16 and layer in (0, num_layers - 1))


def check(fp8: Fp8Config, model: ModelSpec, layout: Layout, dtype: str, *, on_cpu: bool) -> None:
    """Refuse what this model, layout and machine cannot do. UserError names the key, the rule and the
    remedy.
    """
    check_model(fp8, model, layout)
    if on_cpu:
        check_cpu(fp8)
    elif torch.cuda.is_available():  # else it is planned for other machines, which look at their GPUs
        check_gpu(
            fp8,
            dtype=dtype,
            capability=torch.cuda.get_device_capability(),
            cuda=torch.version.cuda,
            transformer_engine=transformer_engine_version(),
        )


def check_model(fp8: Fp8Config, model: ModelSpec, layout: Layout) -> None:
    """Refuse weight shards that the recipe's blocks do not divide. UserError names the size and the way
    out.
    """
    if fp8.first_last_bf16 and model.num_layers < 3:
        raise UserError(
            f"policy.fp8.first_last_bf16=true leaves none of the model's {model.num_layers} layers in FP8; "
            f"set it to false"
        )
    multiple = MULTIPLE[fp8.recipe]
    for name, size, key, parts in (
        ("hidden size", model.hidden_size, "tensor_parallel", 1),
        ("query, key and value size", model.query_size + 2 * model.key_size, "tensor_parallel", layout.tp),
        ("size of all heads", model.query_size, "tensor_parallel", layout.tp),
        (
            "MLP size",
            model.ffn_size,
            *(("tensor_parallel", layout.tp) if model.dense else ("expert_tensor_parallel", layout.etp)),
        ),
    ):
        if size % (parts * multiple):
            fits = [r for r, m in MULTIPLE.items() if size % (parts * m) == 0]
            raise UserError(
                f"policy.fp8.recipe={fp8.recipe} needs multiples of {multiple}, but the model's {name} "
                f"{size} over "
                f"layout.{key}={parts} is {size / parts:g} on each rank; lower layout.{key}"
                + (f" or use recipe {' or '.join(fits)}" if fits else " or set policy.fp8=null")
            )


def check_cpu(fp8: Fp8Config) -> None:
    """Refuse what the emulation does not model."""
    if fp8.param_gather:
        raise UserError(
            "policy.fp8.param_gather=true changes how a GPU stores parameters, which the CPU's emulation "
            "does not model; set it to false"
        )


def check_gpu(
    fp8: Fp8Config,
    *,
    dtype: str,
    capability: tuple[int, int],
    cuda: str | None,
    transformer_engine: tuple[int, int] | None,
) -> None:
    """Refuse a GPU (compute capability), CUDA version, compute type or TransformerEngine that cannot do the
    recipe.
    """
    if dtype != "bf16":
        raise UserError(
            f"policy.fp8 on a GPU needs model.dtype=bf16, not {dtype}; {dtype} is for its emulation on CPU"
        )
    if transformer_engine is None or transformer_engine < LEAST_TRANSFORMER_ENGINE:
        installed = (
            "it is not installed" if transformer_engine is None else f"{_dotted(transformer_engine)} is"
        )
        raise UserError(
            f"policy.fp8 on a GPU needs TransformerEngine {_dotted(LEAST_TRANSFORMER_ENGINE)} or later, but "
            f"{installed}; pip install 'transformer-engine[pytorch]>=2.9' (requirements.txt), set "
            "policy.fp8=null or emulate it with run.device=cpu"
        )
    least, end, least_cuda = GPUS[fp8.recipe]
    if capability < least or (end and capability >= end):
        able = [
            r for r, (low, high, _) in GPUS.items() if low <= capability and not (high and capability >= high)
        ]
        raise UserError(
            f"policy.fp8.recipe={fp8.recipe} needs compute capability {_dotted(least)} or later"
            + (f" and below {_dotted(end)}" if end else "")
            + f", but this GPU has {_dotted(capability)}; "
            + (f"use recipe {' or '.join(able)}" if able else "set policy.fp8=null")
        )
    if cuda is None or tuple(int(part) for part in cuda.split(".")[:2]) < least_cuda:
        raise UserError(
            f"policy.fp8.recipe={fp8.recipe} needs CUDA {_dotted(least_cuda)} or later, but torch is built "
            f"for {cuda}; "
            "use a newer container, another recipe or policy.fp8=null"
        )


def transformer_engine_version() -> tuple[int, int] | None:
    """Major and minor version of the installed TransformerEngine, or None."""
    try:
        major, minor = metadata.version("transformer-engine").split(".")[:2]
    except metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
