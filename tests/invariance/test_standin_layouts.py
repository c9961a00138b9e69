"""The GPU's branch of the policy, with TransformerEngine's layers (a stand-in here), is the same model as the
CPU's in every layout: loss, gradients, weights and log-probabilities are the reference's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import reference
from support.cases import PolicyRun
from support.invariance import RELATIVE, Case, World, check
from support.standin import Job, run_in_turn, run_ranks

DENSE = [Case(layout=layout) for layout in ("tp1", "tp2_sp", "pp2", "pp2_vpp2", "cp2", "dp2")]
EXPERTS = [Case(layout=layout) for layout in ("ep2", "tp2_sp")]
FULL = ("recompute=full",)
MLP = ("recompute=selective", "recompute_modules=[mlp]")
OVERLAP = ("overlap_grad_reduce=true", "overlap_param_gather=true")
SLOW = {
    ("dense", 2): [
        Case(layout="tp2", tied=True),
        Case(layout="tp2_sp", tied=True, policy=FULL),
        Case(layout="pp2_vpp2", tied=True, budget="one", policy=MLP),
        Case(layout="dp2", policy=OVERLAP, num_updates=1),
        Case(layout="dp2", budget="all", distributed=False),
    ],
    ("dense", 4): [
        Case(layout="tp2_sp_pp2_vpp2", policy=(*FULL, *OVERLAP)),
        Case(layout="tp2_sp_cp2", tied=True, budget="one", num_updates=4),
        Case(layout="tp2_pp2"),
    ],
    ("experts", 2): [Case(layout="cp2"), Case(layout="pp2", tied=True), Case(layout="tp2_sp_etp2")],
    ("experts", 4): [Case(layout="tp2_sp_ep2_dp2"), Case(layout="pp2_ep2_cp2", budget="one")],
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, World]:
    folder = tmp_path_factory.mktemp("standin")
    dense = World(folder / "dense")
    return {"dense": dense, "experts": World(folder / "experts", arch="qwen3_moe")}


@pytest.fixture(scope="module")
def measured(worlds) -> list[list[Any]]:
    """Of the dense model's cases, the experts' cases and the dense model's log-probabilities: the reports by
    rank, from one launch.
    """
    jobs: list[Job] = []

    def later(job: str, ranks: int, *, timeout_s: float, **arguments: Any) -> list[Any]:
        jobs.append((job, arguments))
        return []

    worlds["dense"].measure(2, DENSE, run=later)
    worlds["experts"].measure(2, EXPERTS, run=later)
    runs = [
        PolicyRun(name=f"logprobs-{case.name}", model=worlds["dense"].models[False], layout=case.layout)
        for case in DENSE
    ]
    arguments = {"runs": runs, "sizes": {run.name: [] for run in runs}, "folder": str(worlds["dense"].folder)}
    jobs.append(("support.jobs_policy:logprobs_and_export", arguments))
    return run_in_turn(jobs, 2, timeout_s=550)


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_transformer_engines_layers_equal_the_reference(worlds, measured, case):
    world = worlds["dense"]
    check(world, world.expected(case.tied, case.num_updates), measured[0], case)


@pytest.mark.parametrize("case", EXPERTS, ids=lambda case: case.name)
def test_transformer_engines_experts_equal_the_reference(worlds, measured, case):
    world = worlds["experts"]
    check(world, world.expected(case.tied, case.num_updates), measured[1], case)


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_log_probabilities_equal_the_reference(worlds, measured, case):
    world = worlds["dense"]
    model = reference.load(world.models[False])
    parts = []
    for sample in world.samples:
        with torch.no_grad():
            now_T = torch.cat([torch.zeros(1), reference.logprobs(model, sample)])
        parts.append(torch.where(sample.response_mask, now_T, 0.0))
    expected_T = torch.cat(parts)
    name = f"logprobs-{case.name}"
    found = [torch.tensor(report[name]) for report in measured[2] if name in report]
    assert found
    for found_T in found:
        assert float((found_T - expected_T).abs().max() / expected_T.abs().max()) < RELATIVE


@pytest.mark.slow
@pytest.mark.parametrize(("model", "ranks"), SLOW)
def test_more_layouts_equal_the_reference(worlds, model, ranks):
    world, cases = worlds[model], SLOW[model, ranks]
    found = world.measure(ranks, cases, run=run_ranks)
    for case in cases:
        check(world, world.expected(case.tied, case.num_updates), found, case)
