"""Rank arithmetic against tables written by hand."""

from __future__ import annotations

import re

import pytest

from megatron_dapo.errors import UserError
from megatron_dapo.layout import Coordinates, Layout

# tp fastest, then dp, then pp: what Megatron-Core's default order "tp-cp-ep-dp-pp" gives
TP2_DP2_PP2 = [
    # rank, tp, dp, pp
    (0, 0, 0, 0),
    (1, 1, 0, 0),
    (2, 0, 1, 0),
    (3, 1, 1, 0),
    (4, 0, 0, 1),
    (5, 1, 0, 1),
    (6, 0, 1, 1),
    (7, 1, 1, 1),
]
# tp fastest, then cp, dp, pp, with sizes that cannot be confused
TP3_CP2_DP2_PP2 = [
    # rank, tp, cp, dp, pp
    (0, 0, 0, 0, 0),
    (2, 2, 0, 0, 0),
    (3, 0, 1, 0, 0),
    (6, 0, 0, 1, 0),
    (11, 2, 1, 1, 0),
    (12, 0, 0, 0, 1),
    (16, 1, 1, 0, 1),
    (23, 2, 1, 1, 1),
]


@pytest.mark.parametrize(("rank", "tp", "dp", "pp"), TP2_DP2_PP2)
def test_tp2_dp2_pp2(rank, tp, dp, pp):
    layout = Layout(tp=2, dp=2, pp=2)
    at = Coordinates(tp=tp, cp=0, dp=dp, pp=pp)
    assert layout.coordinates(rank) == at
    assert layout.rank(at) == rank


@pytest.mark.parametrize(("rank", "tp", "cp", "dp", "pp"), TP3_CP2_DP2_PP2)
def test_tp3_cp2_dp2_pp2(rank, tp, cp, dp, pp):
    layout = Layout(tp=3, cp=2, dp=2, pp=2)
    at = Coordinates(tp=tp, cp=cp, dp=dp, pp=pp)
    assert layout.coordinates(rank) == at
    assert layout.rank(at) == rank


def test_expert_and_virtual_sizes_add_no_ranks():
    assert Layout(tp=2, dp=4, pp=2, ep=4, vpp=2).world_size == 16


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_world_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is outside a world of 8"):
        Layout(tp=2, dp=2, pp=2).coordinates(rank)


@pytest.mark.parametrize("name", ["tp", "cp", "ep", "etp", "pp", "dp"])
def test_sizes_start_at_one(name):
    with pytest.raises(UserError, match=rf"layout\.{name}=0 must be at least 1"):
        Layout(**{name: 0})


def test_sequence_parallel_needs_tensor_parallel():
    with pytest.raises(UserError, match=r"layout\.sequence_parallel=true needs layout\.tensor_parallel > 1"):
        Layout(sp=True)
    assert Layout(tp=2, sp=True).sp


@pytest.mark.parametrize(("vpp", "pp"), [(2, 1), (1, 2)])
def test_virtual_stages_need_stages(vpp, pp):
    with pytest.raises(
        UserError,
        match=rf"virtual_pipeline_parallel={vpp} needs at least 2 chunks and .* > 1, got {pp}; set it to",
    ):
        Layout(vpp=vpp, pp=pp)


def test_stages_and_rounds_of_micro_batches():
    assert (Layout(pp=3).num_stages, Layout(pp=3).micro_batch_multiple) == (3, 1)
    assert (Layout(pp=3, vpp=2).num_stages, Layout(pp=3, vpp=2).micro_batch_multiple) == (6, 3)


def test_the_number_of_processes_must_fit():
    layout = Layout(tp=2, pp=3, dp=2)
    layout.check_world_size(12)
    product = "tensor_parallel 2 x context_parallel 1 x pipeline_parallel 3 x data_parallel 2 = 12"
    with pytest.raises(UserError, match=re.escape(f"8 ranks were started but layout needs {product}")):
        layout.check_world_size(8)


MODEL = {"num_layers": 12, "num_heads": 8, "num_kv_heads": 2, "hidden_size": 64, "ffn_size": 96}


@pytest.mark.parametrize(
    ("sizes", "changed", "message"),
    [
        ({"tp": 4}, {}, "tensor_parallel=4 does not divide the model's 2 key/value heads; use one of [1, 2]"),
        ({"tp": 2}, {"num_heads": 9}, "does not divide the model's 9 attention heads; use one of [1, 3, 9]"),
        ({"tp": 2}, {"hidden_size": 63}, "does not divide the model's 63 hidden size"),
        ({"tp": 2}, {"ffn_size": 95}, "does not divide the model's 95 MLP size"),
        (
            {"pp": 5},
            {},
            "pipeline_parallel=5 (x virtual 1) does not divide the model's 12 layers; use one of [1, 2, 3, "
            "4, 6, 12] stages",
        ),
        (
            {"ep": 2, "dp": 2},
            {},
            "expert_parallel=2 and expert_tensor_parallel=1 need a model with experts; set both to 1",
        ),
        (
            {"ep": 2, "dp": 2},
            {"num_experts": 3},
            "expert_parallel=2 does not divide the model's 3 experts; use one of [1, 3]",
        ),
        (
            {"etp": 5, "dp": 5},
            {"num_experts": 4},
            "expert_tensor_parallel=5 does not divide the model's 96 MLP size",
        ),
        (
            {"tp": 2},
            {"num_experts": 4},
            "tensor_parallel=2 of a model with experts needs layout.sequence_parallel=true",
        ),
        ({"pp": 4, "vpp": 2}, {}, "pipeline_parallel=4 (x virtual 2) does not divide the model's 12 layers"),
    ],
)
def test_a_model_that_does_not_split_is_refused(sizes, changed, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Layout(**sizes).check_model(**{**MODEL, **changed})


def test_a_model_that_splits_is_accepted():
    Layout(tp=2, pp=3, vpp=2, dp=5).check_model(**MODEL)


def test_the_description():
    assert Layout(tp=2, dp=4).describe() == "tp2 x pp1 x dp4"
    assert (
        Layout(tp=2, sp=True, pp=4, vpp=2, cp=2, ep=2).describe()
        == "tp2 x pp4 x dp1 x cp2 x ep2 x vpp2 + sequence parallel"
    )
