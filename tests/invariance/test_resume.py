"""A run that goes on at another layout is, to rounding, the run that kept its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.cases import PolicyRun
from support.invariance import EPS, LR, RELATIVE, WEIGHTS
from support.jobs_resume import tensors_of
from support.models import make_tiny_model
from support.ranks import run_ranks


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a run is laid out, and what holds its optimizer's state."""

    layout: str
    dtype: str = "fp32"
    distributed: bool = True
    offload: float = 0.0

    def __str__(self) -> str:
        words = [self.layout, self.dtype] + (["offload"] if self.offload else [])
        return "-".join(words + ([] if self.distributed else ["whole"]))

    def run(self, name: str, model: str) -> PolicyRun:
        overrides = [
            f"optimizer.lr={LR}",
            f"optimizer.eps={EPS}",
            "optimizer.warmup_updates=4",
            f"optimizer.distributed={self.distributed}",
            f"optimizer.cpu_offload={self.offload}",
            f"model.dtype={self.dtype}",
        ]
        return PolicyRun(name=name, model=model, layout=self.layout, overrides=overrides)


def whole(layout: str, **changed: Any) -> Setup:
    """Without the distributed optimizer."""
    return Setup(layout=layout, distributed=False, **changed)


def pairs_of(loaders: dict[Setup, list[Setup]]) -> list[tuple[Setup, Setup]]:
    return [(saver, loader) for saver, others in loaders.items() for loader in others]


def at(layout: str) -> Setup:
    return Setup(layout=layout)


FP32 = pairs_of(
    {at("dp2"): [at("tp2_sp_pp2_vpp2"), whole("pp2")], whole("tp2_pp2"): [at("dp2_cp2")]},
)
BF16 = pairs_of({Setup(layout="dp2", dtype="bf16", offload=0.5): [Setup(layout="tp2_pp2", dtype="bf16")]})
MORE_FP32 = pairs_of(
    {
        at("dp2"): [at("dp2"), at("tp1")],
        at("tp2_pp2"): [at("dp2"), at("pp2_vpp2"), at("cp2"), whole("tp2")],
        at("tp2_sp_pp2_vpp2"): [at("tp2_pp2"), at("dp2_cp2")],
        whole("dp2_cp2"): [at("tp2_dp2"), at("pp2_vpp2")],
    }
)
MORE_BF16 = pairs_of(
    {
        Setup(layout="tp2_pp2", dtype="bf16"): [
            Setup(layout="dp2", dtype="bf16", offload=1.0),
            whole("tp2_dp2", dtype="bf16"),
        ],
        whole("dp2", dtype="bf16"): [Setup(layout="pp2_vpp2", dtype="bf16")],
    }
)
EXPERTS = pairs_of(
    {
        at("tp2_sp_ep2_dp2"): [at("ep2"), at("tp2_sp_etp2"), at("tp2_sp_ep2_pp2"), whole("tp1")],
        at("tp2_sp_ep2_pp2"): [at("tp2_sp_ep2_dp2"), at("pp2")],
        at("tp2_sp_etp2"): [at("tp2_sp_ep2_dp2")],
    }
)


def pair_name(pair: tuple[Setup, Setup]) -> str:
    return f"{pair[0]}-to-{pair[1]}"


@dataclass(frozen=True)
class Runs:
    """What each pair's runs reported (that which kept its layout, that which went on at another), and their
    folders.
    """

    folder: Path
    kept: dict[str, list[list[float]]]
    resumed: dict[str, list[list[float]]]


def run_pairs(folder: Path, pairs: list[tuple[Setup, Setup]], model: str) -> Runs:
    savers = {str(saver): saver.run(str(saver), model) for saver, _ in pairs}
    saved = run_ranks(
        "support.jobs_resume:train_save_go_on",
        4,
        runs=list(savers.values()),
        folder=str(folder),
        timeout_s=500,
    )
    resumed = run_ranks(
        "support.jobs_resume:load_save_go_on",
        4,
        runs=[pair[1].run(pair_name(pair), model) for pair in pairs],
        saved_by={pair_name(pair): str(pair[0]) for pair in pairs},
        folder=str(folder),
        timeout_s=500,
    )
    return Runs(folder, saved[0], resumed[0])


def shortened(folder: Path) -> str:
    """The model without its last vocabulary row, so that tensor parallelism pads the vocabulary."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size - 1)
    model.save_pretrained(folder)
    return str(folder)


def run_dense_pairs(folder: Path, pairs: list[tuple[Setup, Setup]]) -> Runs:
    sizes: dict[str, Any] = dict(layers=4, heads=4, kv_heads=2, hidden=64, ffn=72)
    return run_pairs(folder, pairs, shortened(make_tiny_model(folder / "model", tied=True, **sizes)))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Runs:
    return run_dense_pairs(tmp_path_factory.mktemp("dense"), FP32 + BF16)


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> Runs:
    return run_dense_pairs(tmp_path_factory.mktemp("more"), MORE_FP32 + MORE_BF16)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("experts")
    sizes: dict[str, Any] = dict(layers=2, heads=4, kv_heads=2, hidden=64, ffn=72)
    return run_pairs(folder, EXPERTS, str(make_tiny_model(folder / "model", arch="qwen3_moe", **sizes)))


def assert_goes_on_as_if_kept(runs: Runs, pair: tuple[Setup, Setup]) -> None:
    name = pair_name(pair)
    kept = runs.kept[str(pair[0])]
    for mine, theirs in zip(runs.resumed[name], kept, strict=True):
        assert mine[:2] == pytest.approx(theirs[:2], rel=RELATIVE)
        assert mine[2] == theirs[2]
    assert len({lr for _, _, lr in kept}) > 1  # the schedule has not ended
    expected, found = exported(runs.folder / str(pair[0])), exported(runs.folder / name)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert (found[key] - values).abs().max() < WEIGHTS, key


def exported(folder: Path) -> dict[str, torch.Tensor]:
    files = (folder / "hf").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_saved_again_as_it_was(runs: Runs, pair: tuple[Setup, Setup]) -> None:
    """Bit for bit, but for padding of the vocabulary, which is zero."""
    before, after = (
        tensors_of(runs.folder / name / "checkpoints" / "step_000002")
        for name in (str(pair[0]), pair_name(pair))
    )
    assert before.keys() == after.keys()
    moments = [name for name in before if ".exp_avg" in name]
    assert moments and all(before[name].any() for name in moments)
    for name, values in before.items():
        rows = min(len(values), len(after[name]))
        assert torch.equal(values[:rows], after[name][:rows]), name
        assert not values[rows:].any() and not after[name][rows:].any(), name


@pytest.mark.parametrize("pair", FP32, ids=pair_name)
def test_another_layout_goes_on_as_the_one_that_was_kept(dense, pair):
    assert_goes_on_as_if_kept(dense, pair)


@pytest.mark.parametrize("pair", FP32 + BF16, ids=pair_name)
def test_another_layout_saves_what_it_loaded(dense, pair):
    assert_saved_again_as_it_was(dense, pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", MORE_FP32 + MORE_BF16, ids=pair_name)
def test_more_layouts(more, pair):
    assert_saved_again_as_it_was(more, pair)
    if pair in MORE_FP32:
        assert_goes_on_as_if_kept(more, pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", EXPERTS, ids=pair_name)
def test_experts_go_on_at_another_layout(experts, pair):
    assert_goes_on_as_if_kept(experts, pair)
    assert_saved_again_as_it_was(experts, pair)
