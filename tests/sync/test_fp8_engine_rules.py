"""What rollout.quantization=fp8_block is refused with: words that name field, value, rule and remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.samples import make_spec

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import read_model
from megatron_dapo.sync.fp8_engine_rules import check

ROOT = Path(__file__).parents[2]
# 4 heads and 2 key/value heads of 128
SIZES = dict(
    num_layers=2, hidden_size=512, num_heads=4, num_kv_heads=2, head_dim=128, ffn_size=1024, vocab_size=320
)


def check_model(*options: str, on_gpu: bool = True, **sizes: int) -> None:
    config = RunConfig.load(None, ["model.path=m", "rollout.quantization=fp8_block", *options])
    check(config, make_spec(**SIZES | sizes), config.layout.to_layout(), on_gpu=on_gpu)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ([], {}),
        (["rollout.tensor_parallel=2", "layout.tensor_parallel=2", "layout.pipeline_parallel=2"], {}),
        ([], {"hidden_size": 576}),  # the last block of the columns is not full
        (["rollout.tensor_parallel=2"], {"num_experts": 4, "ffn_size": 64}),
    ],
)
def test_what_can_work_passes(options, sizes):
    check_model(*options, **sizes)


@pytest.mark.parametrize(
    ("options", "sizes", "message"),
    [
        (["model.dtype=fp32"], {}, "needs model.dtype=bf16, not fp32: FP8 is made of bf16 weights; set it"),
        (
            ["rollout.load_format=auto"],
            {},
            "needs rollout.load_format=dummy, not auto: the checkpoint is not",
        ),
        (
            ["run.verify_sync=true"],
            {},
            "needs run.verify_sync=false, not true: no server can load the export",
        ),
        (
            ["rollout.tensor_parallel=2"],
            {"num_kv_heads": 1},
            "needs multiples of 128, but the model's size of all key/value heads 128 over "
            "rollout.tensor_parallel=2 is 64 on each worker; lower that, or set rollout.quantization to null",
        ),
        ([], {"head_dim": 16}, "the model's size of all heads 64 over rollout.tensor_parallel=1 is 64"),
        (["rollout.tensor_parallel=2"], {"ffn_size": 640}, "intermediate size 640 over"),
        (
            ["rollout.tensor_parallel=2"],
            {"num_experts": 4, "ffn_size": 96},
            "needs multiples of 32, but the model's intermediate size 96 over rollout.tensor_parallel=2 is",
        ),
        (
            ["layout.tensor_parallel=2"],
            {"ffn_size": 640},
            "a rank of the policy holds rows 0 to 319 of model.layers.0.mlp.gate_proj.weight, but "
            "rollout.quantization=fp8_block needs whole blocks of 128; choose a layout.tensor_parallel that "
            "cuts it at multiples of 128, or set rollout.quantization to null",
        ),
    ],
)
def test_what_cannot_work_is_refused(options, sizes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_model(*options, **sizes)


def test_engines_without_a_gpu_are_refused():
    with pytest.raises(UserError, match="fp8_block needs engines on a GPU, and torch sees none; use one, or"):
        check_model(on_gpu=False)


@pytest.mark.parametrize("recipe", ["qwen32b", "qwen32b_async"])
def test_the_flagships_recipes_allow_it(tmp_path, recipe):
    model_configs = ROOT / "tools" / "model_configs"
    (tmp_path / "config.json").write_text((model_configs / "Qwen2.5-32B.json").read_text())
    (tmp_path / "tokenizer.json").write_text("{}")  # which is only looked for
    options = ["rollout.quantization=fp8_block"]
    config = RunConfig.load(ROOT / "examples" / "configs" / f"{recipe}.yaml", options)
    check(config, read_model(tmp_path), config.layout.to_layout(), on_gpu=True)
