"""Predicted against measured on this machine: what Megatron's objects hold, and what autograd keeps."""

from __future__ import annotations

import pytest
from support.jobs_planning import config_of, small_model
from support.ranks import run_ranks

from megatron_dapo.planning.activations import CPU_LAYERS, rank_activations
from megatron_dapo.planning.sizes import rank_sizes

EXPERTS = {
    "num_experts": 8,
    "experts_per_token": 2,
    "ffn_size": 160,
    "renormalize_experts": True,
    "qk_norm": True,
}


def keys(**layout):
    return [f"layout.{name}={str(value).lower()}" for name, value in layout.items()]


def recompute(*modules: str) -> list[str]:
    return ["policy.recompute=selective", f"policy.recompute_modules=[{','.join(modules)}]"]


TP2 = keys(tensor_parallel=2, sequence_parallel=True)
SIZES = {
    "tp4_sp_pp2_dp2": (
        {},
        keys(tensor_parallel=4, sequence_parallel=True, pipeline_parallel=2, data_parallel=2),
    ),
    "tied_pp4_vpp2_dp3": (
        {"tied": True},
        keys(tensor_parallel=2, pipeline_parallel=4, virtual_pipeline_parallel=2, data_parallel=3),
    ),
    "tied_cp2_dp2": ({"tied": True}, keys(context_parallel=2, data_parallel=2)),
    "experts_tp2_pp2_dp4_ep4": (
        EXPERTS,
        [*TP2, *keys(pipeline_parallel=2, data_parallel=4, expert_parallel=4)],
    ),
    "experts_ep2_etp2": (EXPERTS, keys(data_parallel=4, expert_parallel=2, expert_tensor_parallel=2)),
    "not_distributed": ({}, [*keys(data_parallel=2), "optimizer.distributed=false"]),
}
REAL = {
    "dense": ({}, []),
    "query_key_norms": ({"qk_norm": True}, []),
    "experts": (EXPERTS, []),
    "tp2": ({}, keys(tensor_parallel=2)),
    "tp2_sp": ({}, TP2),
    "tp2_sp_pp2": ({}, [*TP2, *keys(pipeline_parallel=2)]),
    "dp2": ({}, keys(data_parallel=2)),
    "recomputes_mlp": ({}, recompute("mlp")),
    "recomputes_mlp_and_norms": ({}, recompute("mlp", "layernorm")),
    "recomputes_experts": (EXPERTS, recompute("moe")),
    "recomputes_all": ({}, ["policy.recompute=full"]),
}
FP32 = ["model.dtype=fp32", "batch.max_tokens=512"]


@pytest.fixture(scope="module")
def measured():
    """By name of SIZES and REAL, from one process."""
    cases = [{"changes": changes, "overrides": overrides} for changes, overrides in SIZES.values()]
    cases += [
        {"changes": {"num_layers": 4} | changes, "overrides": [*FP32, *overrides], "real": True}
        for changes, overrides in REAL.values()
    ]
    [results] = run_ranks("support.jobs_planning:measure", 1, cases=cases)
    return dict(zip([*SIZES, *REAL], results, strict=True))


@pytest.mark.parametrize("name", SIZES)
def test_the_formula_counts_what_megatron_builds_on_meta(measured, name):
    changes, overrides = SIZES[name]
    config, model = config_of(overrides), small_model(**changes)
    for stage, built in enumerate(measured[name]["built"]):
        planned = rank_sizes(config, model, stage)
        assert planned.elements == built[0]
        # Megatron pads its buffers, which shows in a model as small as this
        others = [planned.weights, planned.gradients, planned.optimizer]
        assert others == pytest.approx(built[1:], rel=0.001)


@pytest.mark.parametrize("name", REAL)
def test_parameters_gradients_and_optimizer_within_5_percent(measured, name):
    changes, overrides = REAL[name]
    config = config_of([*FP32, *overrides])
    planned = rank_sizes(
        config, small_model(**({"num_layers": 4} | changes)), config.layout.pipeline_parallel - 1
    )
    found = measured[name]
    assert planned.weights == pytest.approx(found["parameters"], rel=0.05)
    assert planned.gradients == pytest.approx(found["gradients"], rel=0.05)
    assert planned.optimizer == pytest.approx(found["moments"], rel=0.05)  # fp32 has no copies


@pytest.mark.parametrize("name", REAL)
def test_activations_within_5_percent(measured, name):
    changes, overrides = REAL[name]
    config, model = config_of([*FP32, *overrides]), small_model(**({"num_layers": 4} | changes))
    stage = config.layout.pipeline_parallel - 1
    planned = rank_activations(config, model, stage, micro_batches=1, layers=CPU_LAYERS)
    assert planned.kept == pytest.approx(measured[name]["kept"], rel=0.05)
