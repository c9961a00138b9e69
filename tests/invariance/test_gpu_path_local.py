"""A GPU without TransformerEngine (policy.layers=local): the paper's loss, gradients and weights by the GPU's
branch of the policy. Devices named cuda are the CPU here, and NCCL is gloo.
"""

from __future__ import annotations

import pytest
from support.invariance import Case, World, check
from support.local_layers import run_ranks

LOCAL = "layers=local"
SOME = (LOCAL, "recompute=selective", "recompute_modules=[mlp,layernorm]")
OVERLAP = (LOCAL, "overlap_grad_reduce=true", "overlap_param_gather=true")
ON_2 = [Case(policy=(LOCAL,)), Case(layout="tp2_sp", policy=SOME)]
MORE = [
    Case(layout="tp2", tied=True, policy=(LOCAL,)),
    Case(layout="pp2", policy=(LOCAL,)),
    Case(layout="pp2_vpp2", tied=True, policy=(LOCAL, "recompute=full")),
    Case(layout="cp2", budget="one", policy=(LOCAL,)),
    Case(layout="dp2", policy=OVERLAP),
]
EXPERTS = [Case(layout=layout, policy=(LOCAL,)) for layout in ("tp1", "tp2_sp", "cp2", "pp2")]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("local_layers"))


@pytest.fixture(scope="module")
def measured(world):
    return world.measure(2, ON_2, run=run_ranks)


@pytest.mark.parametrize("case", ON_2, ids=lambda case: case.name)
def test_local_layers_on_a_gpu_equal_the_reference(world, measured, case):
    check(world, world.expected(case.tied, case.num_updates), measured, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_local_layers_on_a_gpu_equal_the_reference_in_more_layouts(tmp_path, kind):
    cases = MORE if kind == "dense" else EXPERTS
    world = World(tmp_path, **({"arch": "qwen3_moe"} if kind == "experts" else {}))
    found = world.measure(2, cases, run=run_ranks)
    for case in cases:
        check(world, world.expected(case.tied, case.num_updates), found, case)
