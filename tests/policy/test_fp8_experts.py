"""FP8 emulated in a model with experts: each expert quantises the tokens it is sent, as TransformerEngine's
grouped products do.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support import reference
from support.cases import PolicyRun
from support.fp8_reference import operand
from support.models import make_tiny_model
from support.ranks import run_ranks
from support.samples import make_samples

from megatron_dapo.policy.fp8 import E4M3

LAYOUTS = ("tp1", "ep2", "tp2_sp_ep2", "tp2_sp_etp2")
RUNS = [
    (f"{layout} {recipe}", layout, [f"policy.fp8.recipe={recipe}"])
    for layout in LAYOUTS
    for recipe in ("mxfp8", "delayed")
] + [("tp1 off", "tp1", [])]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(
        tmp_path_factory.mktemp("fp8") / "m",
        arch="qwen3_moe",
        layers=4,
        heads=4,
        kv_heads=2,
        hidden=128,
        ffn=64,
    )


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    return run_ranks(
        "support.jobs_fp8:measure",
        2,
        runs=[
            PolicyRun(name=name, model=str(model), layout=layout, overrides=overrides)
            for name, layout, overrides in RUNS
        ],
        folder=str(tmp_path_factory.mktemp("stores")),
    )


def quantised(x_RC: torch.Tensor, role: str) -> torch.Tensor:
    return operand(x_RC, "mxfp8", role, 1, E4M3).float()


def experts_forward(
    self: Any, hidden_TH: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """As in transformers, with operands quantised. Megatron weighs the MLP's activation, not its output."""
    out_TH = torch.zeros_like(hidden_TH)
    for e in chosen_TK.unique().tolist():
        token, k = (chosen_TK == e).nonzero(as_tuple=True)
        gate, up = (quantised(hidden_TH[token], "input") @ quantised(self.gate_up_proj[e], "weight").T).chunk(
            2, -1
        )
        activation = torch.nn.functional.silu(gate) * up * weights_TK[token, k, None]
        out_TH.index_add_(0, token, quantised(activation, "input") @ quantised(self.down_proj[e], "weight").T)
    return out_TH


@pytest.fixture(scope="module")
def expected(model):
    """Log-probabilities [T] of transformers, whose linear layers and experts quantise their operands by the
    reference.
    """
    loaded = reference.load(model, torch.float32)
    for name, part in loaded.model.layers.named_modules():
        if name.endswith("mlp.experts"):
            part.forward = functools.partial(experts_forward, part)
        elif isinstance(part, torch.nn.Linear):
            part.weight.data = quantised(part.weight.data, "weight")
            part.register_forward_pre_hook(lambda _, args: quantised(args[0][0], "input")[None])
    parts = []
    with torch.no_grad():
        for sample in make_samples():
            parts.append(
                torch.cat([torch.zeros(1), reference.logprobs(loaded, sample)]) * sample.response_mask
            )
    return torch.cat(parts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_equal_transformers_with_quantised_operands(measured, expected, layout):
    found, plain = (torch.tensor(measured[0][name]["before"]) for name in (f"{layout} mxfp8", "tp1 off"))
    error, gap = ((found - other)[found != 0].abs().median() for other in (expected, plain))
    assert float(error) < 1e-4 and float(gap) > 0.05
    assert measured[0][f"{layout} mxfp8"]["grad_norm"] == pytest.approx(
        measured[0]["tp1 mxfp8"]["grad_norm"], rel=0.05
    )


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_delayed_scales_are_shared_by_the_ranks(measured, layout):
    first, second = (ranks[f"{layout} delayed"] for ranks in measured)
    assert first["scale"] == second["scale"] and first["scale"]["grad"] != 1.0


@pytest.mark.parametrize("layout", ["ep2", "tp2_sp_etp2"])
def test_delayed_scales_are_in_the_checkpoint(model, tmp_path, layout):
    for through, resumed in run_ranks(
        "support.jobs_fp8:save_and_resume", 2, model=str(model), folder=str(tmp_path), layout=layout
    ):
        assert resumed == through and 1.0 not in through[2:]
