"""Every supported architecture, split in every way that treats it differently: the paper's loss, gradients and weights."""

from __future__ import annotations

from typing import Any

import pytest
from test_layouts import World, check, name_of

DENSE = [{"layout": "tp2"}, {"layout": "pp2", "tied": True}]
EXPERTS = [
    {"layout": "tp2_sp"},
    {"layout": "cp2"},
    {"layout": "ep2"},
    {"layout": "tp2_sp_ep2"},
    {"layout": "tp2_sp_etp2"},
    {"layout": "pp2", "tied": True},
]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "mistral": {"arch": "mistral"},
    "qwen3": {"arch": "qwen3"},
    "qwen3_moe": {"arch": "qwen3_moe"},
    "qwen3_moe-not_renormalized": {"arch": "qwen3_moe", "renormalize_experts": False},
}
CASES = [(name, case) for name in ("llama", "mistral", "qwen3") for case in DENSE] + [("qwen3_moe", case) for case in EXPERTS]
SLOW = [
    ("qwen3_moe", 4, {"layout": "tp2_sp_ep2_dp2"}),
    ("qwen3_moe", 4, {"layout": "tp2_sp_ep2_etp2_dp2"}),
    ("qwen3_moe", 4, {"layout": "ep2_etp2_dp4"}),
    ("qwen3_moe", 4, {"layout": "pp2_ep2_cp2", "budget": "one"}),
    ("qwen3_moe-not_renormalized", 2, {"layout": "ep2"}),
    ("qwen3", 4, {"layout": "tp2_sp_cp2"}),
    ("mistral", 4, {"layout": "tp2_sp_pp2_vpp2"}),
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
    found: dict[str, Any] = {}

    def results(name: str) -> Any:
        if name not in found:
            found[name] = worlds(name).measure(2, [case for model, case in CASES if model == name])
        return found[name]

    return results


def expected(world: World, case: dict[str, Any]) -> dict:
    tied = case.get("tied", False)
    return {(tied, 2): world.expected(tied, 2)}


@pytest.mark.parametrize(("name", "case"), CASES, ids=lambda x: x if isinstance(x, str) else name_of(x))
def test_a_model_equals_the_reference(worlds, measured, name, case):
    check(worlds(name), expected(worlds(name), case), measured(name), case)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks", "case"), SLOW, ids=lambda x: name_of(x) if isinstance(x, dict) else str(x))
def test_a_model_equals_the_reference_in_larger_layouts(worlds, name, ranks, case):
    check(worlds(name), expected(worlds(name), case), worlds(name).measure(ranks, [case]), case)
