"""Quantised exports: values, figures of the report, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict, namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.convert_runs import weights
from support.fp8_checkpoints import quantised
from support.quantised import CASES, Exports, dequantised, rollouts

from megatron_dapo.convert import quantized, workers
from megatron_dapo.convert.dequantize import Folder
from megatron_dapo.convert.job import Job
from megatron_dapo.convert.logit_gap import Rollout
from megatron_dapo.convert.quantized import Quantisation, export_quantised
from megatron_dapo.errors import UserError

# Of a weight with normally distributed values: three bits of mantissa round by 1 / 38, one bit and scales
# of 16 by 1 / 10, fifteen steps over the largest of 128 values by 1 / 8.
LARGEST_ERROR = {"fp8": 0.035, "fp8_block": 0.035, "nvfp4": 0.11, "int4_awq": 0.14}
LARGEST_KL = {"fp8": 0.1, "fp8_block": 0.1, "nvfp4": 1.0, "int4_awq": 1.0}


def export(source: Path, out: Path, scheme: str = "fp8_block", **changed):
    sequences = changed.pop("rollouts", [])
    job = Quantisation(source=source, out=out, scheme=scheme, **changed)
    return export_quantised(job, sequences, say=lambda text: None)


@pytest.mark.parametrize(("arch", "scheme"), CASES)
def test_values_and_their_errors(exports: Exports, arch, scheme):
    """By a dequantisation of the test's own. AWQ moves a factor from the norm into the columns behind it."""
    result, original = exports.made(arch, scheme), weights(exports.model(arch))
    found, read = dequantised(result.out), Folder(result.out)
    assert found.keys() == original.keys()
    linear = {name for name in original if name.endswith("_proj.weight")}
    assert {error.name for error in result.errors} == linear
    norms = {"q": "input", "k": "input", "v": "input", "gate": "post_attention", "up": "post_attention"}
    for error in result.errors:
        assert torch.equal(read.weight(error.name), found[error.name])
        before, after = original[error.name].bfloat16().float(), found[error.name].clone()
        layer, kind = ".".join(error.name.split(".")[:3]), error.name.split(".")[-2].removesuffix("_proj")
        if kind in norms:
            norm = f"{layer}.{norms[kind]}_layernorm.weight"
            after *= found[norm] / original[norm].bfloat16().float()
        relative = float((after - before).norm() / before.norm())
        assert error.relative == pytest.approx(relative, rel=1e-5)
        assert error.largest == pytest.approx(float((after - before).abs().max()), rel=1e-5)
        assert 0.001 < error.relative < LARGEST_ERROR[scheme]
    smoothed = {"norm"} if scheme == "int4_awq" else set()
    for name in original.keys() - linear:
        if not smoothed or "layernorm" not in name:
            assert torch.equal(found[name], original[name].bfloat16().float()), name


@pytest.mark.parametrize(("arch", "scheme"), CASES)
def test_kl_is_that_of_the_responses(exports: Exports, arch, scheme, tmp_path):
    from transformers import AutoModelForCausalLM

    result, source = exports.made(arch, scheme), exports.model(arch)
    logprobs = []
    for tensors in (weights(source), dequantised(result.out)):
        folder = tmp_path / f"{len(logprobs)}"
        shutil.copytree(source, folder)
        rounded = {k: v.bfloat16().float() if not logprobs else v for k, v in tensors.items()}
        save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = [
                model(torch.tensor([r.tokens])).logits[0, r.num_prompt_tokens - 1 : -1] for r in rollouts()
            ]
        logprobs.append(torch.cat(logits).log_softmax(-1))
    kl = torch.nn.functional.kl_div(logprobs[1], logprobs[0], log_target=True, reduction="batchmean")
    assert result.kl == pytest.approx(float(kl), rel=1e-4)
    assert result.kl is not None and 0 < result.kl < LARGEST_KL[scheme]
    assert result.num_tokens == len(logprobs[0])


def test_block_fp8_is_that_of_rollout_weights(exports: Exports):
    """vLLM's own function; tests/sync has it equal what a push brings."""
    made = weights(exports.made("qwen2", "fp8_block").out)
    expected = quantised(weights(exports.model("qwen2")))
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_activations_are_measured_on_the_rollouts(exports: Exports):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exports.model("qwen2"), dtype=torch.bfloat16).float()
    largest: dict[str, float] = defaultdict(float)

    def watch(name: str, layer: torch.nn.Module) -> None:
        def see(module, inputs, output) -> None:
            largest[name] = max(largest[name], float(inputs[0].abs().max()))

        layer.register_forward_hook(see)

    for name, layer in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):  # the others share theirs
            watch(name, layer)
    with torch.no_grad():
        for rollout in rollouts():
            model(torch.tensor([rollout.tokens]))
    made = weights(exports.made("qwen2", "fp8").out)
    found = {name: float(made[f"{name}.input_scale"]) for name in largest}
    assert len(found) == 4
    assert found == pytest.approx({name: value / 448 for name, value in largest.items()}, rel=1e-3)


def test_files_beside_the_weights(exports: Exports, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(exports.model("llama"), source)
    (source / "README.md").write_text("# Mine\n")
    (source / "LICENSE").write_text("free")
    result = export(source, tmp_path / "out", rollouts=rollouts())
    card = (result.out / "README.md").read_text()
    assert card.startswith("# Mine\n\n## Quantisation\n") and f"{result.kl:.3g} nats" in card
    assert (result.out / "LICENSE").read_text() == "free"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (result.out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((result.out / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["quantization_config"]["quant_method"] == "fp8"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == ["out"]


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4"])
def test_both_configurations_of_modelopt(exports: Exports, scheme):
    folder = exports.made("qwen2", scheme).out
    told = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == told["quant_algo"] == scheme.upper()
    assert config["quantization_config"]["ignore"] == told["exclude_modules"]
    before = json.loads((exports.model("qwen2") / "config.json").read_text())
    assert {key: value for key, value in config.items() if key != "quantization_config"} == before | {
        "dtype": "bfloat16"
    }


def test_files_of_a_size(exports: Exports, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "SHARD_BYTES", 200_000)
    folder = export(exports.model("llama"), tmp_path / "out").out
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(files) > 5
    for tensors in files.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 200_000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    whole = weights(exports.made("llama", "fp8_block").out)
    assert whole.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_a_megatron_checkpoint(exports: Exports, tmp_path):
    source = exports.model("llama")
    job = Job(to="megatron", source=source, hf_source=source, out=tmp_path / "megatron")
    workers.convert(job, environment={})
    with pytest.raises(UserError, match="is no Hugging Face folder; give --hf-source"):
        export(job.out, tmp_path / "out")
    made = export(job.out, tmp_path / "out", hf_source=source)
    expected = export(source, tmp_path / "expected")
    found, wanted = weights(made.out), weights(expected.out)
    assert all(torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted)
    assert made.kl is None and made.num_tokens == 0


# --- what is refused --------------------------------------------------------------------


def refused(tmp_path: Path, match: str, source: Path, **changed) -> None:
    with pytest.raises(UserError, match=match) as caught:
        export(source, tmp_path / "out", **changed)
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_a_folder_that_exists(exports: Exports, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="exists; nothing is overwritten"):
        export(exports.model("llama"), tmp_path / "out")
    assert (tmp_path / "out" / "mine").is_file()


@pytest.mark.parametrize(
    ("arch", "changed", "match"),
    [
        ("llama", {"scheme": "fp8"}, "--scheme fp8 is calibrated on rollouts and there are none"),
        ("llama", {"scheme": "nvfp4_awq"}, "--scheme nvfp4_awq needs a GPU: ModelOpt"),
        ("llama", {"scheme": "fp6"}, "--scheme fp6 is none of fp8, fp8_block, nvfp4, int4_awq"),
        ("llama", {"rollouts": [Rollout((1, 999), 1)]}, "have the token 999, the model's vocabulary 104"),
        (
            "qwen3_moe",
            {"scheme": "int4_awq", "rollouts": rollouts()},
            "ModelOpt 0.47 cannot export the experts",
        ),
    ],
)
def test_what_cannot_be_done(exports: Exports, tmp_path, arch, changed, match):
    refused(tmp_path, match, exports.model(arch), **changed)


def test_sizes_that_do_not_divide(small_llama, tmp_path):
    match = r"--scheme int4_awq: model.layers.0.self_attn.q_proj.weight is \[.*a multiple of 128"
    refused(tmp_path, match, small_llama, scheme="int4_awq", rollouts=rollouts())


def test_heads_without_whole_blocks(small_llama, tmp_path):
    refused(
        tmp_path, "fp8_block: vLLM needs multiples of 128, but the model's size of all heads", small_llama
    )


def test_nan_and_an_unknown_architecture(exports: Exports, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(exports.model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, :2] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, r"has NaN in 1 tensors: model.layers.1.mlp.up_proj.weight \(2\)", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    refused(tmp_path, "architecture GPT2LMHeadModel is not known; to add a model edit", source)


def test_without_modelopt(exports: Exports, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    match = "--scheme nvfp4 needs nvidia-modelopt"
    refused(tmp_path, match, exports.model("llama"), scheme="nvfp4", rollouts=rollouts())


def test_a_disk_that_is_too_small(exports: Exports, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000))
    refused(tmp_path, r"needs 0\.\d+ GB while it is made, its disk has 0.00 GB free", exports.model("llama"))
