"""ModelOpt's quantisation on a CPU: FP8 per tensor and NVFP4 as ModelOpt writes them, AWQ's INT4 in the
format of compressed-tensors, because vLLM reads no INT4 of ModelOpt's.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dapo.convert.dequantize import Folder
from megatron_dapo.convert.logit_gap import Rollout
from megatron_dapo.errors import UserError

PRESETS = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG", "int4_awq": "INT4_AWQ_CFG"}
INT4_GROUP = 128  # columns that share a scale, in ModelOpt's preset


def quantise(model: Any, scheme: str, rollouts: Sequence[Rollout], folder: Path) -> None:
    """Quantise the model in place and write it to `folder` as ModelOpt does.

    rollouts: what activations are measured on (FP8, NVFP4), and AWQ searches its scales with. UserError
    without ModelOpt.
    """
    with _quiet():
        try:
            import modelopt.torch.quantization as mtq
            from modelopt.torch.export import export_hf_checkpoint
        except ImportError as error:
            raise UserError(
                f"--scheme {scheme} needs nvidia-modelopt ({error}); install it, or choose fp8_block"
            ) from error

        def run(quantised: Any) -> None:
            with torch.no_grad():
                for rollout in rollouts:
                    quantised(torch.tensor([rollout.tokens]), use_cache=False)

        mtq.quantize(model, getattr(mtq, PRESETS[scheme]), forward_loop=run)
        if scheme == "int4_awq":
            _drop_scales_without_norm(model)
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder)


def _drop_scales_without_norm(model: Any) -> None:
    """AWQ scales the input of every layer. ModelOpt moves these scales into the norm before it; there is none
    before the attention's output and the mlp's, whose scales go back into their weights.
    """
    from modelopt.torch.export.quant_utils import _update_pre_quant_scale

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            _update_pre_quant_scale(module, torch.ones_like(module.input_quantizer.pre_quant_scale))
            delattr(module.input_quantizer, "_pre_quant_scale")


def read_tensors(folder: Path, scheme: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Of ModelOpt's checkpoint: what is not quantised in bf16, INT4 as compressed-tensors packs it."""
    made, packs = Folder(folder), scheme == "int4_awq"
    for name in made:
        if name.endswith(("_scale", "_scale_2")):
            if not packs:  # INT4's come with their weights
                scales = made.read(name)
                yield name, scales.view(()) if scales.numel() == 1 else scales
            continue
        values = made.read(name)
        if packs and values.dtype == torch.uint8:
            layer = name.removesuffix("weight")
            yield from _pack(layer, values, made.read(layer + "weight_scale"))
        else:
            yield name, values.to(torch.bfloat16) if values.dtype == torch.float32 else values
    made.close()


def _pack(layer: str, pairs: torch.Tensor, scales: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """pairs: uint8 [rows / 2, columns], the first of two rows in the low half."""
    rows = torch.stack((pairs & 0xF, pairs >> 4), dim=1).flatten(0, 1).int()
    codes = rows ^ 8  # two's complement to the value + 8
    shifted = codes.view(len(codes), -1, 8) << torch.arange(0, 32, 4, dtype=torch.int32)
    yield layer + "weight_packed", shifted.sum(-1, dtype=torch.int32)
    yield layer + "weight_scale", scales.to(torch.bfloat16)
    yield layer + "weight_shape", torch.tensor(codes.shape, dtype=torch.int64)


def read_config(folder: Path, scheme: str) -> dict[str, Any]:
    """The quantization_config of config.json for `read_tensors`."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if scheme != "int4_awq":
        return config
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": INT4_GROUP}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": config["ignore"],
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt and what it imports warn much, and print to standard output."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
