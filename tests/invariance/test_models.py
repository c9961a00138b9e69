"""Every supported architecture, split in every way that treats it differently: the paper's loss, gradients
and weights.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.invariance import Case, World, check

DENSE = [Case(layout="tp2"), Case(layout="pp2", tied=True)]
EXPERTS = [
    Case(layout="tp2_sp"),
    Case(layout="cp2"),
    Case(layout="ep2"),
    Case(layout="tp2_sp_ep2"),
    Case(layout="tp2_sp_etp2"),
    Case(layout="pp2", tied=True),
]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "mistral": {"arch": "mistral"},
    "qwen3": {"arch": "qwen3"},
    "qwen3_moe": {"arch": "qwen3_moe"},
    "qwen3_moe-not_renormalized": {"arch": "qwen3_moe", "renormalize_experts": False},
}
CASES = [(name, case) for name in ("llama", "mistral", "qwen3") for case in DENSE] + [
    ("qwen3_moe", case) for case in EXPERTS
]
SLOW = [
    ("qwen3_moe", 4, Case(layout="tp2_sp_ep2_dp2")),
    ("qwen3_moe", 4, Case(layout="tp2_sp_ep2_etp2_dp2")),
    ("qwen3_moe", 4, Case(layout="ep2_etp2_dp4")),
    ("qwen3_moe", 4, Case(layout="pp2_ep2_cp2", budget="one")),
    ("qwen3_moe-not_renormalized", 2, Case(layout="ep2")),
    ("qwen3", 4, Case(layout="tp2_sp_cp2")),
    ("mistral", 4, Case(layout="tp2_sp_pp2_vpp2")),
]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """World of a model, made when it is first asked for."""
    made: dict[str, World] = {}

    def world(name: str) -> World:
        if name not in made:
            made[name] = World(tmp_path_factory.mktemp(name), **MODELS[name])
        return made[name]

    return world


@pytest.fixture(scope="module")
def measured(worlds):
    """Results of a model's cases, from one launch of ranks each."""
    reports: dict[str, Any] = {}

    def results(name: str) -> Any:
        if name not in reports:
            reports[name] = worlds(name).measure(2, [case for model, case in CASES if model == name])
        return reports[name]

    return results


def name_of(value: Any) -> str:
    return value.name if isinstance(value, Case) else str(value)


@pytest.mark.parametrize(("name", "case"), CASES, ids=name_of)
def test_a_model_equals_the_reference(worlds, measured, name, case):
    world = worlds(name)
    check(world, world.expected(case.tied, 2), measured(name), case)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks", "case"), SLOW, ids=name_of)
def test_a_model_equals_the_reference_in_larger_layouts(worlds, name, ranks, case):
    world = worlds(name)
    check(world, world.expected(case.tied, 2), world.measure(ranks, [case]), case)
