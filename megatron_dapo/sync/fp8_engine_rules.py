"""What a run with engines in block FP8 (rollout.quantization) must be like; a part of preflight."""

from __future__ import annotations

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.sync.fp8_blocks import block_holdings
from megatron_dapo.sync.sources import holdings
from megatron_dapo.weights.block_fp8 import BLOCK, linear_weights
from megatron_dapo.weights.names import hf_shapes

REMEDY = "or set rollout.quantization to null"


def check(config: RunConfig, spec: ModelSpec, layout: Layout, *, on_gpu: bool) -> None:
    """UserError names the fields, their values, the rule and the remedy. on_gpu: the engines' kernels."""
    _weights_come_with_pushes(config)
    if not on_gpu:
        raise UserError(
            f"rollout.quantization=fp8_block needs engines on a GPU, and torch sees none; use one, {REMEDY}"
        )
    _workers_have_whole_blocks(config.rollout.tensor_parallel, spec)
    block_holdings(holdings(spec, layout), linear_weights(hf_shapes(spec)))  # refuses ranks without them


def _weights_come_with_pushes(config: RunConfig) -> None:
    """And with nothing else: no checkpoint of a run is in FP8."""
    for field, value, needed, why in (
        ("model.dtype", config.model.dtype, "bf16", "FP8 is made of bf16 weights"),
        ("rollout.load_format", config.rollout.load_format, "dummy", "the checkpoint is not in FP8"),
        ("run.verify_sync", config.run.verify_sync, False, "no server can load the export as FP8"),
    ):
        if value != needed:
            raise UserError(
                f"rollout.quantization=fp8_block needs {field}={str(needed).lower()}, not "
                f"{str(value).lower()}: {why}; set it, {REMEDY}"
            )


def _workers_have_whole_blocks(tp: int, spec: ModelSpec) -> None:
    """Those of experts may be cut, down to 32 x 32: vLLM then repeats the scales as it loads them."""
    for name, size, block in (
        ("size of all heads", spec.query_size, BLOCK),
        ("size of all key/value heads", spec.key_size, BLOCK),
        ("intermediate size", spec.ffn_size, 32 if spec.num_experts else BLOCK),
    ):
        if size % (block * tp):
            raise UserError(
                f"rollout.quantization=fp8_block needs multiples of {block}, but the model's {name} {size} "
                f"over rollout.tensor_parallel={tp} is {size // tp} on each worker; lower that, {REMEDY}"
            )
