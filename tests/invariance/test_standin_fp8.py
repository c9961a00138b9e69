"""Which layers compute in FP8 on a GPU, when and under which recipe, as TransformerEngine's stand-in notes,
and what it keeps on the device meanwhile. The stand-in rounds nothing: results are those of bf16.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.cases import PolicyRun
from support.models import make_tiny_model
from support.standin import run_ranks

BF16 = ("model.dtype=bf16", "optimizer.lr=1e-3")
BLOCKWISE = (*BF16, "policy.fp8.recipe=blockwise", "policy.fp8.first_last_bf16=true")
DELAYED = (*BF16, "policy.fp8.recipe=delayed", "policy.recompute=full")
LINEAR = ("linear_fc1", "linear_fc2", "linear_proj", "linear_qkv")
# query, key and value of 4 and 2 heads of 32; attention output; two parts of the MLP; its output: in bf16
LAYER_BYTES = 2 * 128 * ((4 + 2 * 2) * 32 + 4 * 32 + 2 * 256 + 256)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fp8")
    model = make_tiny_model(folder / "model", layers=4, hidden=128, ffn=256, heads=4, kv_heads=2)
    runs = [
        PolicyRun(name=name, model=str(model), overrides=overrides)
        for name, overrides in (("bf16", BF16), ("blockwise", BLOCKWISE), ("delayed", DELAYED))
    ]
    job = "support.jobs_standin:quantised"
    (found,) = run_ranks(job, 1, runs=runs, folder=str(folder), timeout_s=400)
    return found


def expected(layers: range, recipe: str, passes: dict[tuple[bool, bool], int]) -> list[list[Any]]:
    """The log of all linear layers of these transformer layers; passes: (recomputed, training), how often."""
    return [
        [layer, name, recipe, *kind, times]
        for layer in layers
        for name in LINEAR
        for kind, times in sorted(passes.items())
    ]


def test_layers_are_transformer_engines(measured):
    names = {"TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear"}
    assert all(set(found["kinds"]) == names for found in measured.values())


def test_without_fp8_nothing_is_quantised(measured):
    found = measured["bf16"]
    assert found["log of update"] == found["log of log-probabilities"] == []
    assert found["copies"] == [0, 0, 0]


def test_blockwise_quantises_all_layers_but_the_first_and_the_last(measured):
    found = measured["blockwise"]
    num = found["micro_batches"]
    assert num > 1
    inner = range(1, 3)
    assert found["log of update"] == expected(inner, "Float8BlockScaling", passes={(False, True): num})
    assert found["log of log-probabilities"] == expected(
        inner, "Float8BlockScaling", passes={(False, False): num}
    )


def test_delayed_quantises_all_layers_and_again_where_they_are_recomputed(measured):
    found = measured["delayed"]
    num = found["micro_batches"]
    passes = {(False, True): num, (True, True): num}
    assert found["log of update"] == expected(range(4), "DelayedScaling", passes=passes)


@pytest.mark.parametrize(("name", "layers"), [("blockwise", 2), ("delayed", 4)])
def test_copies_of_weights_leave_the_device_with_the_optimizer(measured, name, layers):
    copied = layers * LAYER_BYTES
    assert measured[name]["copies"] == [copied, 0, copied]


@pytest.mark.parametrize("name", ["blockwise", "delayed"])
def test_every_pass_uses_the_weights_of_its_time(measured, name):
    """A copy that outlived an update, or came back from the host, would give other log-probabilities."""
    found, plain = measured[name], measured["bf16"]
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert found["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    assert found["again"] == found["after"]
    for when in ("before", "after"):
        assert found[when] == pytest.approx(plain[when], abs=1e-2)
    moved = max(abs(x - y) for x, y in zip(plain["before"], plain["after"], strict=True))
    assert moved > 0.1  # which the bounds above can tell
