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
    "value_tp2_sp_pp2_dp2": (
        {"tied": True},
        [*TP2, *keys(pipeline_parallel=2, data_parallel=2), "objective.kind=ppo"],
    ),
    "fp8": ({}, [*TP2, *keys(pipeline_parallel=2), "policy.fp8.first_last_bf16=true"]),
    "experts_in_fp8": (EXPERTS, [*keys(data_parallel=2, expert_parallel=2), "policy.fp8.recipe=mxfp8"]),
}
META = {
    # name: model, overrides; in bf16, at lengths that only meta tensors have
    "bf16": ({}, []),
    "bf16_tp2_sp_pp2_vpp2": ({}, [*TP2, *keys(pipeline_parallel=2, virtual_pipeline_parallel=2)]),
    "bf16_query_key_norms": ({"qk_norm": True}, []),
    "bf16_recomputes_mlp_and_norms": ({}, recompute("mlp", "layernorm")),
    "bf16_recomputes_all": ({}, ["policy.recompute=full"]),
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
    """By name of SIZES, REAL and META, from one process."""
    cases = [{"changes": changes, "overrides": overrides} for changes, overrides in SIZES.values()]
    cases += [
        {"changes": {"num_layers": 4} | changes, "overrides": [*FP32, *overrides], "real": True}
        for changes, overrides in REAL.values()
    ]
    cases += [
        {"changes": changes, "overrides": ["batch.max_tokens=32768", *overrides]}
        for changes, overrides in META.values()
    ]
    [results] = run_ranks("support.jobs_planning:measure", 1, timeout_s=600, cases=cases)
    return dict(zip([*SIZES, *REAL, *META], results, strict=True))


@pytest.mark.parametrize("name", SIZES)
def test_the_formula_counts_what_megatron_builds_on_meta(measured, name):
    changes, overrides = SIZES[name]
    config, model = config_of(overrides), small_model(**changes)
    for stage, built in enumerate(measured[name]["built"]):
        planned = rank_sizes(config, model, stage)
        assert planned.elements == built[0]
        # Megatron pads its buffers, which shows in a model as small as this
        others = [planned.weights, planned.gradients, planned.optimizer]
        assert others == pytest.approx(built[1:4], rel=0.001)
        assert planned.quantized == built[4] and (built[4] > 0) == ("fp8" in name)


def test_the_formula_counts_a_value_model(measured):
    _, overrides = SIZES["value_tp2_sp_pp2_dp2"]
    config, model = config_of(overrides), small_model(tied=True)
    for stage, built in enumerate(measured["value_tp2_sp_pp2_dp2"]["value"]):
        planned = rank_sizes(config, model, stage, value=True)
        assert planned.elements == built[0]
        others = [planned.weights, planned.gradients, planned.optimizer]
        assert others == pytest.approx(built[1:4], rel=0.001)
    assert measured["not_distributed"]["value"] == [None]


@pytest.mark.parametrize("name", [name for name in (*REAL, *META) if not name.endswith("experts")])
def test_a_pass_on_meta_keeps_what_the_table_says(measured, name):
    for found in measured[name]["one_pass"]:
        assert found["without_gradient"] == 0
        wide = name in REAL or name.endswith("recomputes_all")  # small ones have norms' statistics beside
        assert found["local"] == pytest.approx(found["autograd"], rel=0.05 if wide else 0.01)


@pytest.mark.parametrize("name", [name for name in REAL if not name.endswith("experts")])
def test_meta_tensors_keep_what_real_ones_do(measured, name):
    """One sequence instead of two, so the padding of batches of sequences is another."""
    assert measured[name]["one_pass"][-1]["autograd"] == pytest.approx(measured[name]["kept"], rel=0.02)


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
