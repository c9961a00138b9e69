"""A trained model as a quantised Hugging Face folder for servers, and what the rounding costs.

Block FP8 is made by the code that quantises rollout weights (weights/block_fp8.py), the other schemes by
ModelOpt (modelopt_export.py). The whole model is in memory, in fp32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dapo.convert import logit_gap, modelopt_export, workers
from megatron_dapo.convert.checkpoint import find
from megatron_dapo.convert.dequantize import Error, Folder, errors
from megatron_dapo.convert.job import SHARD_BYTES, Job, check_target, count_nan
from megatron_dapo.convert.logit_gap import Rollout
from megatron_dapo.convert.mapping import check_hf, read_spec
from megatron_dapo.convert.safetensors_files import read_folder
from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.weights import hf
from megatron_dapo.weights.block_fp8 import (
    BLOCK,
    LINEAR,
    SCALES,
    linear_weights,
    quantization_config,
    quantize,
)
from megatron_dapo.weights.names import hf_shapes

# What the columns of a linear layer's weight must be a multiple of.
SCHEMES = {"fp8": 1, "fp8_block": 1, "nvfp4": 16, "int4_awq": modelopt_export.INT4_GROUP}
NEEDS_GPU = {
    "nvfp4_awq": "ModelOpt 0.47 searches AWQ's scales for NVFP4 with a kernel that takes CUDA tensors alone",
}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """source: a Hugging Face folder or any checkpoint that is read here (checkpoint.py). hf_source: where
    config.json and tokenizer of a source in Megatron's format are.
    """

    source: Path
    out: Path
    scheme: str
    hf_source: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """num_bytes: of the weights, in bf16 and as written. kl: KL(original || quantised) of the next token on
    the rollouts' responses, nats a token; None without rollouts. errors: of each quantised weight.
    """

    scheme: str
    out: Path
    num_bytes: tuple[int, int]
    kl: float | None
    num_tokens: int
    errors: tuple[Error, ...]


def export_quantised(job: Quantisation, rollouts: Sequence[Rollout], say: Say) -> Result:
    """Write `job.out`, whole or not at all. `say` is told sizes before the work begins.

    rollouts: of the run; needed by all schemes but fp8_block. UserError for what cannot be quantised.
    """
    check_target(job.out)
    _check_scheme(job.scheme, rollouts)
    partial = job.out.with_name(job.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    converted = partial / "source"
    try:
        source = _hf_folder(job, converted)
        model = read_spec(source)
        _check_model(job.scheme, model, rollouts, source)
        _check_room(job, model, bool(rollouts), say)
        folder = partial / "quantised"
        folder.mkdir(parents=True)
        result = _quantise(job, source, folder, model, rollouts)
        _write_card(source, folder, result)
        folder.rename(job.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _check_scheme(scheme: str, rollouts: Sequence[Rollout]) -> None:
    if scheme in NEEDS_GPU:
        raise UserError(
            f"--scheme {scheme} needs a GPU: {NEEDS_GPU[scheme]}; choose one of {', '.join(SCHEMES)}"
        )
    if scheme not in SCHEMES:
        raise UserError(f"--scheme {scheme} is none of {', '.join(SCHEMES)}")
    if not rollouts and scheme != "fp8_block":
        raise UserError(f"--scheme {scheme} is calibrated on rollouts and there are none; give --calibrate")


def _hf_folder(job: Quantisation, converted: Path) -> Path:
    """The source, converted to Hugging Face's format if it is in another one."""
    form, folder = find(job.source)
    if form == "hf":
        return folder
    if job.hf_source is None:
        raise UserError(f"{folder} is no Hugging Face folder; give --hf-source, the model that it began with")
    converted.parent.mkdir(parents=True, exist_ok=True)
    workers.convert(Job(to="hf", source=folder, hf_source=job.hf_source, out=converted, dtype="bf16"))
    return converted


def _check_model(scheme: str, model: ModelSpec, rollouts: Sequence[Rollout], source: Path) -> None:
    """Names, shapes and values. UserError for NaN, which ModelOpt would not notice."""
    if scheme == "int4_awq" and model.num_experts:
        raise UserError(
            f"--scheme int4_awq: ModelOpt 0.47 cannot export the experts of {model.architecture} with AWQ "
            "(TypeError in get_experts_list); choose fp8, fp8_block or nvfp4"
        )
    if scheme == "fp8_block":
        _check_blocks(model)
    shapes = hf_shapes(model)
    for name, shape in linear_weights(shapes).items():
        if shape[1] % SCHEMES[scheme]:
            raise UserError(
                f"--scheme {scheme}: {name} is {list(shape)}; its columns must be a multiple of "
                f"{SCHEMES[scheme]}; choose fp8"
            )
    largest = max((max(rollout.tokens) for rollout in rollouts), default=0)
    if largest >= model.vocab_size:
        raise UserError(
            f"--calibrate: the rollouts have the token {largest}, the model's vocabulary {model.vocab_size}; "
            "give rollouts of the same run"
        )
    check_hf(read_folder(source), model, source)
    tensors = Folder(source)
    nans = {name: count for name in shapes if (count := count_nan(tensors.read(name)))}
    tensors.close()
    if nans:
        name, count = next(iter(nans.items()))
        raise UserError(f"{source} has NaN in {len(nans)} tensors: {name} ({count}), ...; repair it")


def _check_blocks(model: ModelSpec) -> None:
    """vLLM joins query, key and value, and gate and up, whole block after whole block; experts' of 32."""
    for name, size, block in (
        ("size of all heads", model.query_size, BLOCK),
        ("size of all key/value heads", model.key_size, BLOCK),
        ("intermediate size", model.ffn_size, 32 if model.num_experts else BLOCK),
    ):
        if size % block:
            raise UserError(
                f"--scheme fp8_block: vLLM needs multiples of {block}, but the model's {name} is {size}; "
                "choose fp8"
            )


def _check_room(job: Quantisation, model: ModelSpec, in_memory: bool, say: Say) -> None:
    """Disk is checked, memory is said. in_memory: whether the model is run."""
    parameters = sum(map(_num_elements, hf_shapes(model).values()))
    if in_memory:
        say(
            f"{parameters / 1e9:.3f} billion parameters: {4 * parameters / 1e9:.2f} GB of memory for "
            "the model in fp32, twice that for a moment when the quantised one is loaded"
        )
    needed, free = 3 * parameters, shutil.disk_usage(job.out.parent).free
    if free < needed:
        raise UserError(
            f"{job.out} needs {needed / 1e9:.2f} GB while it is made, its disk has {free / 1e9:.2f} GB free; "
            "free space or choose another --out"
        )


def _quantise(
    job: Quantisation, source: Path, folder: Path, model: ModelSpec, rollouts: Sequence[Rollout]
) -> Result:
    names = list(hf_shapes(model))
    network = logit_gap.load(source) if rollouts else None
    before = logit_gap.hidden_states(network, rollouts) if rollouts else []
    if job.scheme == "fp8_block":
        _write_tensors(source, folder, _block_tensors(source, names), quantization_config(hf_shapes(model)))
    else:
        _write_modelopt(job.scheme, network, rollouts, source, folder)
    del network
    original, quantised = Folder(source), Folder(folder)
    kl = None
    if rollouts:
        network = logit_gap.load_weights(source, {name: quantised.weight(name) for name in names})
        after = logit_gap.hidden_states(network, rollouts)
        kl = logit_gap.mean_kl(network.get_output_embeddings(), before, after)
    result = Result(
        scheme=job.scheme,
        out=job.out,
        num_bytes=(2 * sum(map(_num_elements, hf_shapes(model).values())), _weight_bytes(folder)),
        kl=kl,
        num_tokens=sum(map(len, before)),
        errors=tuple(errors(original, quantised, names)),
    )
    original.close()
    quantised.close()
    return result


def _block_tensors(source: Path, names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
    tensors = Folder(source)
    for name in names:
        values = tensors.read(name).to(torch.bfloat16)
        if name.endswith(LINEAR):
            values, scales = quantize(values)
            yield name + SCALES, scales
        yield name, values
    tensors.close()


def _write_modelopt(
    scheme: str, network: Any, rollouts: Sequence[Rollout], source: Path, folder: Path
) -> None:
    made = folder.with_name("modelopt")
    modelopt_export.quantise(network, scheme, rollouts, made)
    config = modelopt_export.read_config(made, scheme)
    _write_tensors(source, folder, modelopt_export.read_tensors(made, scheme), config)
    if config["quant_method"] == "modelopt":
        shutil.copy(made / "hf_quant_config.json", folder)


def _write_tensors(
    source: Path, folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], config: Mapping[str, Any]
) -> None:
    """Safetensors files with their index, and the source's configuration and tokenizer."""
    file_of: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = used = number = 0

    def finish() -> None:
        nonlocal used, number
        number += 1
        file_of.update(dict.fromkeys(shard, hf.write_shard(folder, number, shard)))
        shard.clear()
        used = 0

    for name, tensor in tensors:
        if shard and used + tensor.nbytes > SHARD_BYTES:
            finish()
        shard[name] = tensor
        used, total = used + tensor.nbytes, total + tensor.nbytes
    finish()
    hf.finish_checkpoint(folder, source, file_of, total, "bf16")
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = dict(config)
    (folder / "config.json").write_text(json.dumps(written, indent=2))


def _write_card(source: Path, folder: Path, result: Result) -> None:
    """The source's model card and licence, with a section about the quantisation."""
    for file in source.glob("LICENSE*"):
        shutil.copy(file, folder / file.name)
    card = source / "README.md"
    mean = sum(error.relative for error in result.errors) / max(1, len(result.errors))
    lines = [
        card.read_text().rstrip() if card.is_file() else f"# {result.out.name}",
        "",
        "## Quantisation",
        "",
        f"Linear layers are in {result.scheme}; relative error of a weight {mean:.4f} on average.",
    ]
    if result.kl is not None:
        lines.append(
            f"KL divergence of the next token from the unquantised model {result.kl:.3g} nats, over "
            f"{result.num_tokens} tokens of the run's own rollouts; weights alone are rounded in it."
        )
    (folder / "README.md").write_text("\n".join([*lines, ""]))


def _weight_bytes(folder: Path) -> int:
    return sum(tensor.num_bytes for tensor in read_folder(folder).values())


def _num_elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
