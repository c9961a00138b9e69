"""What policy.fp8 means to Megatron, and every refusal."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import make_tiny_model
from support.samples import make_spec

from megatron_dapo.config import Fp8Config, PolicyConfig, RunConfig
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import read_model
from megatron_dapo.policy import fp8_rules, rules
from megatron_dapo.policy.backend import CPU, GPU

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(
        tmp_path_factory.mktemp("fp8") / "model", layers=4, heads=2, kv_heads=2, hidden=256, ffn=256
    )


def checked(overrides: list[str]) -> RunConfig:
    """The configuration, refused as a Policy refuses it."""
    config = RunConfig.load(None, overrides)
    rules.check_settings(config)
    return config


# --- what Megatron is told --------------------------------------------------------------


def fp8_of(*overrides: str) -> Fp8Config:
    config = RunConfig.load(None, ["model.path=tiny", *(f"policy.fp8.{o}" for o in overrides)])
    assert config.policy.fp8 is not None
    return config.policy.fp8


def test_keys_and_megatrons_fields():
    fp8 = fp8_of("recipe=mxfp8", "format=hybrid", "param_gather=true", "first_last_bf16=true")
    assert fp8_rules.transformer_fields(fp8) == {
        "fp8": "hybrid",
        "fp8_recipe": "mxfp8",
        "fp8_param": True,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
    }
    assert fp8_rules.ddp_fields(fp8) == {"fp8_param_gather": True, "reuse_grad_buf_for_mxfp8_param_ag": True}
    assert fp8_rules.optimizer_fields(fp8) == {
        "fp8_recipe": "mxfp8",
        "reuse_grad_buf_for_mxfp8_param_ag": True,
    }
    other = fp8_of("recipe=blockwise", "param_gather=true")
    assert fp8_rules.ddp_fields(other) == {
        "fp8_param_gather": True,
        "reuse_grad_buf_for_mxfp8_param_ag": False,
    }
    assert (
        fp8_rules.transformer_fields(None)
        == fp8_rules.ddp_fields(None)
        == fp8_rules.optimizer_fields(None)
        == {}
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("param_gather", [False, True])
@pytest.mark.filterwarnings("ignore:mxfp8 without")
def test_megatron_takes_the_fields(model, recipe, param_gather, monkeypatch):
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.fp8_utils import get_fp8_align_size, is_first_last_bf16_layer
    from megatron.core.optimizer import OptimizerConfig

    from megatron_dapo.policy import model as model_file

    real = (
        model_file.TransformerConfig
    )  # which refuses this one option where TransformerEngine is not installed
    monkeypatch.setattr(
        model_file, "TransformerConfig", lambda **given: real(**{**given, "apply_rope_fusion": False})
    )
    fp8 = Fp8Config(recipe=recipe, param_gather=param_gather, first_last_bf16=recipe != "delayed")
    config = model_file.transformer_config(read_model(model), Layout(), PolicyConfig(fp8=fp8), "bf16", GPU)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("e4m3", recipe, param_gather)
    assert DistributedDataParallelConfig(**fp8_rules.ddp_fields(fp8)).fp8_param_gather == param_gather
    assert OptimizerConfig(**fp8_rules.optimizer_fields(fp8)).fp8_recipe == recipe
    for number in range(4):
        assert fp8_rules.is_quantized(fp8, number, 4) != is_first_last_bf16_layer(config, number)
    assert fp8_rules.token_multiple(fp8, Layout()) % get_fp8_align_size(recipe) == 0
    emulated = model_file.transformer_config(read_model(model), Layout(), PolicyConfig(fp8=fp8), "fp32", CPU)
    assert emulated.fp8 is None  # not TransformerEngine's


def test_tokens_are_padded_on_every_sequence_parallel_rank():
    assert [fp8_rules.token_multiple(Fp8Config(recipe=r), Layout(tp=4)) for r in RECIPES] == [16, 16, 128, 32]
    assert [fp8_rules.token_multiple(Fp8Config(recipe=r), Layout(tp=4, sp=True)) for r in RECIPES] == [
        64,
        64,
        512,
        128,
    ]
    assert (
        fp8_rules.token_multiple(None, Layout(tp=4, sp=True)) == 4
        and fp8_rules.token_multiple(None, Layout(tp=4)) == 1
    )


class KeptInFp8(torch.nn.Parameter):
    """What of TransformerEngine's FP8 parameters the loader relies on: only whole values can be written."""

    def __new__(cls, shape: tuple[int, ...]) -> KeptInFp8:
        return super().__new__(cls, torch.full(shape, math.nan))

    def narrow(self, *args: Any) -> torch.Tensor:
        return self.detach().clone().narrow(*args)  # a dequantised copy

    def get_high_precision_init_val(self) -> torch.Tensor:
        return torch.full(self.shape, math.nan)  # of the random initialisation


def test_parameters_kept_in_fp8_get_the_checkpoints_weights(model, monkeypatch):
    from types import SimpleNamespace

    from safetensors.torch import load_file

    from megatron_dapo.policy import model as model_file

    parameter = KeptInFp8((256, 256))  # gate and up of rank 1 of 2, end to end
    monkeypatch.setattr(
        model_file, "named_shards", lambda chunks: [("decoder.layers.2.mlp.linear_fc1.weight", parameter)]
    )
    session: Any = SimpleNamespace(shards=lambda expert: SimpleNamespace(size=2, rank=1))
    model_file.load_weights([], model, read_model(model), session)
    source = load_file(model / "model.safetensors")
    expected = torch.cat([source[f"model.layers.2.mlp.{name}_proj.weight"][128:] for name in ("gate", "up")])
    assert torch.equal(parameter.data, expected)
    assert torch.equal(
        parameter.get_high_precision_init_val(), expected
    )  # the master weights of the optimizer


# --- refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["recipe=delayed", "first_last_bf16=true"],
            "policy.fp8.first_last_bf16=true does not work with policy.fp8.recipe=delayed",
        ),
        (["param_gather=true"], "policy.fp8.param_gather=true needs model.dtype=bf16, not fp32"),
        (
            ["recipe=blockwisee"],
            "policy.fp8.recipe='blockwisee': Input should be 'tensorwise', 'delayed', 'blockwise' or 'mxfp8'",
        ),
        (["format=e5m2"], "policy.fp8.format='e5m2': Input should be 'e4m3' or 'hybrid'"),
        (["recipee=mxfp8"], "unknown key policy.fp8.recipee; did you mean policy.fp8.recipe?"),
    ],
)
def test_configurations_refused(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checked(["model.path=tiny", "model.dtype=fp32", *(f"policy.fp8.{o}" for o in overrides)])


def test_a_gather_needs_the_distributed_optimizer():
    with pytest.raises(ValueError, match=r"policy\.fp8\.param_gather=true needs optimizer\.distributed=true"):
        checked(["model.path=tiny", "policy.fp8.param_gather=true", "optimizer.distributed=false"])


QWEN = make_spec(  # Qwen2.5-0.5B
    num_layers=24,
    hidden_size=896,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    ffn_size=4864,
    vocab_size=151936,
    tied=True,
    qkv_bias=True,
)


@pytest.mark.parametrize(
    ("recipe", "model", "tp", "message"),
    [
        ("blockwise", QWEN, 1, None),
        ("mxfp8", QWEN, 2, None),
        (
            "blockwise",
            QWEN,
            2,
            "policy.fp8.recipe=blockwise needs multiples of 128, but the model's query, key and value size "
            "1152 over "
            "layout.tensor_parallel=2 is 576 on each rank; lower layout.tensor_parallel or use recipe "
            "tensorwise or delayed or mxfp8",
        ),
        (
            "mxfp8",
            replace(QWEN, hidden_size=912),
            1,
            "mxfp8 needs multiples of 32, but the model's hidden size 912",
        ),
        (
            "blockwise",
            replace(QWEN, num_heads=10, num_kv_heads=1, head_dim=32),
            1,
            "the model's size of all heads 320",
        ),
        ("blockwise", replace(QWEN, num_heads=13, head_dim=128), 1, None),
        (
            "tensorwise",
            replace(QWEN, ffn_size=4872),
            1,
            "tensorwise needs multiples of 16, but the model's MLP size 4872",
        ),
    ],
)
def test_sizes_refused(recipe, model, tp, message):
    if message is None:
        fp8_rules.check_model(Fp8Config(recipe=recipe), model, Layout(tp=tp))
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        fp8_rules.check_model(Fp8Config(recipe=recipe), model, Layout(tp=tp))


def test_the_only_remedy_left_is_to_switch_it_off():
    with pytest.raises(
        ValueError, match=r"hidden size 900 over .* is 900 on each rank; .* or set policy\.fp8=null$"
    ):
        fp8_rules.check_model(Fp8Config(), replace(QWEN, hidden_size=900), Layout())


def test_no_layer_would_be_left():
    with pytest.raises(
        ValueError, match=r"first_last_bf16=true leaves none of the model's 2 layers in FP8; set it to false"
    ):
        fp8_rules.check_model(Fp8Config(first_last_bf16=True), replace(QWEN, num_layers=2), Layout())
    fp8_rules.check_model(Fp8Config(first_last_bf16=True), replace(QWEN, num_layers=3), Layout())


def test_an_experts_size_is_split_by_expert_tensor_parallel():
    model = replace(QWEN, num_experts=4, experts_per_token=2, ffn_size=768, num_kv_heads=8, num_heads=16)
    for layout in (Layout(dp=2, ep=2), Layout(tp=8, sp=True), Layout(tp=8, sp=True, etp=2)):
        fp8_rules.check_model(Fp8Config(recipe="blockwise"), model, layout)
    with pytest.raises(
        ValueError,
        match=r"MLP size 768 over layout\.expert_tensor_parallel=4 is 192 on each rank; lower layout\.expert",
    ):
        fp8_rules.check_model(Fp8Config(recipe="blockwise"), model, Layout(tp=4, sp=True, etp=4))


def test_the_emulation_stores_no_parameters_in_fp8():
    with pytest.raises(
        ValueError, match=r"param_gather=true changes how a GPU stores parameters, which the CPU's emulation"
    ):
        fp8_rules.check(Fp8Config(param_gather=True), QWEN, Layout(), "bf16", on_cpu=True)
    fp8_rules.check(Fp8Config(), QWEN, Layout(), "fp32", on_cpu=True)


def test_a_machine_without_gpus_plans_for_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fp8_rules.check(Fp8Config(), QWEN, Layout(), "bf16", on_cpu=False)
    with pytest.raises(ValueError, match="leaves none of the model's 2 layers"):
        two = replace(QWEN, num_layers=2)
        fp8_rules.check(Fp8Config(first_last_bf16=True), two, Layout(), "bf16", on_cpu=False)


HOPPER = dict(dtype="bf16", capability=(9, 0), cuda="12.9", transformer_engine=(2, 9))


@pytest.mark.parametrize(
    ("recipe", "device", "message"),
    [
        *((recipe, {}, None) for recipe in ("tensorwise", "delayed", "blockwise")),
        ("mxfp8", {"capability": (10, 0)}, None),
        ("mxfp8", {"capability": (10, 3), "cuda": "13.0"}, None),
        ("blockwise", {"capability": (12, 0)}, None),  # emulated there by TransformerEngine
        ("tensorwise", {"capability": (8, 9), "cuda": "12.1"}, None),
        (
            "tensorwise",
            {"dtype": "fp32"},
            "policy.fp8 on a GPU needs model.dtype=bf16, not fp32; fp32 is for its emulation on CPU",
        ),
        (
            "tensorwise",
            {"transformer_engine": None},
            "needs TransformerEngine 2.3 or later, but it is not installed; pip install "
            "'transformer-engine[pytorch]>=2.9'",
        ),
        (
            "tensorwise",
            {"transformer_engine": (2, 2)},
            "needs TransformerEngine 2.3 or later, but 2.2 is; pip install",
        ),
        (
            "tensorwise",
            {"capability": (8, 0)},
            "policy.fp8.recipe=tensorwise needs compute capability 8.9 or later, but this GPU has 8.0; set "
            "policy.fp8=null",
        ),
        (
            "delayed",
            {"capability": (8, 6)},
            "policy.fp8.recipe=delayed needs compute capability 8.9 or later, but this GPU has 8.6",
        ),
        (
            "blockwise",
            {"capability": (8, 9)},
            "needs compute capability 9.0 or later, but this GPU has 8.9; use recipe tensorwise or delayed",
        ),
        (
            "blockwise",
            {"cuda": "12.8"},
            "policy.fp8.recipe=blockwise needs CUDA 12.9 or later, but torch is built for 12.8",
        ),
        ("blockwise", {"cuda": None}, "needs CUDA 12.9 or later, but torch is built for None"),
        (
            "mxfp8",
            {},
            "policy.fp8.recipe=mxfp8 needs compute capability 10.0 or later and below 12.0, but this GPU has "
            "9.0; "
            "use recipe tensorwise or delayed or blockwise",
        ),
        (
            "mxfp8",
            {"capability": (12, 0)},
            "needs compute capability 10.0 or later and below 12.0, but this GPU has 12.0",
        ),
    ],
)
def test_devices_refused(recipe, device, message):
    if message is None:
        fp8_rules.check_gpu(Fp8Config(recipe=recipe), **{**HOPPER, **device})
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        fp8_rules.check_gpu(Fp8Config(recipe=recipe), **{**HOPPER, **device})


def test_the_version_that_is_installed(monkeypatch):
    installed = {"transformer-engine": "2.9.0+70f53666"}
    monkeypatch.setattr(fp8_rules.metadata, "version", lambda name: installed[name])
    assert fp8_rules.transformer_engine_version() == (2, 9)
    monkeypatch.undo()
    assert fp8_rules.transformer_engine_version() is None  # no CPU stack has it


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "mxfp8"])
def test_fp8_weights_are_not_offloaded(recipe):
    options = ["model.path=m", "policy.fp8.param_gather=true", "optimizer.cpu_offload=1.0"]
    with pytest.raises(
        ValueError, match=rf"policy\.fp8\.recipe={recipe} does not work with optimizer\.cpu_offload=1"
    ):
        checked([*options, f"policy.fp8.recipe={recipe}"])
    checked([*options, "policy.fp8.recipe=delayed"])
