"""Which ranks hold what: by hand for a small layout, and against Megatron's own groups and models."""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from support.fake_ranks import held_in_megatron
from support.planning import local_weights
from support.weights import make_weights, small_model

from megatron_dapo.layout import Layout
from megatron_dapo.sync.regions import MappedBox
from megatron_dapo.sync.sources import Held, holdings

SIZES = dict(num_layers=4, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=2, ffn_size=8, vocab_size=7)
DENSE = small_model(**SIZES)
TIED = small_model(**SIZES, tied=True)
EXPERTS = small_model(**SIZES, num_experts=4, experts_per_token=2, qk_norm=True, qkv_bias=False)


def test_by_hand():
    held = holdings(DENSE, Layout(tp=2, pp=2, dp=2))  # stage 0 is ranks 0 to 3, of which 0 and 2 are tp 0
    assert held["model.embed_tokens.weight"] == (
        Held(MappedBox((0, 0), (4, 8)), (0, 2)),
        Held(MappedBox((4, 0), (3, 8)), (1, 3)),  # 7 words
    )
    assert held["model.layers.1.self_attn.o_proj.weight"] == (
        Held(MappedBox((0, 0), (8, 4)), (0, 2)),
        Held(MappedBox((0, 4), (8, 4)), (1, 3)),
    )
    assert held["model.layers.2.input_layernorm.weight"] == (Held(MappedBox((0,), (8,)), (4, 5, 6, 7)),)
    assert held["lm_head.weight"][0].ranks == (4, 6)


def test_tied_embeddings_are_on_the_first_and_the_last_stage():
    held = holdings(TIED, Layout(tp=2, pp=2, dp=2))
    assert [part.ranks for part in held["model.embed_tokens.weight"]] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert "lm_head.weight" not in held


def test_an_interleaved_pipeline_deals_its_layers_out():
    held = holdings(DENSE, Layout(pp=2, vpp=2))
    assert [held[f"model.layers.{i}.mlp.up_proj.weight"][0].ranks for i in range(4)] == [
        (0,),
        (1,),
        (0,),
        (1,),
    ]


def test_experts_by_hand():
    held = holdings(EXPERTS, Layout(tp=2, sp=True, dp=2, ep=2))
    assert [held[f"model.layers.0.mlp.experts.{e}.up_proj.weight"] for e in (1, 2)] == [
        (Held(MappedBox((0, 0), (8, 8)), (0, 2)),),
        (Held(MappedBox((0, 0), (8, 8)), (1, 3)),),
    ]


# --- against Megatron -------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean_process():
    """Megatron's CPU backend changes torch in its process for good."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (DENSE, Layout(tp=2, pp=2, dp=2)),
        (TIED, Layout(tp=2, pp=2, vpp=2, cp=2)),
        (EXPERTS, Layout(tp=2, sp=True, pp=2, dp=2, ep=2)),
        (EXPERTS, Layout(tp=2, sp=True, cp=2, dp=2, ep=2, etp=2)),
        (EXPERTS, Layout(tp=2, sp=True, dp=2, ep=4)),
    ],
    ids=lambda value: value.describe() if isinstance(value, Layout) else "",
)
def test_every_rank_holds_what_megatron_gives_it(clean_process, model, layout):
    held = holdings(model, layout)
    in_megatron = clean_process.submit(held_in_megatron, model, layout).result()
    for rank in range(layout.world_size):
        planned: dict[str, set[MappedBox]] = {}
        for name, parts in held.items():
            for part in parts:
                if rank in part.ranks:
                    planned.setdefault(name, set()).add(part.box)
        assert planned == in_megatron[rank], f"rank {rank}"


@pytest.mark.parametrize(
    ("model", "layout"), [(TIED, Layout(tp=2, pp=2)), (EXPERTS, Layout(tp=2, sp=True, dp=2, ep=2, etp=2))]
)
def test_parts_are_the_whole_and_their_holders_have_them(model, layout):
    weights = make_weights(model)
    ranks = [local_weights(model, layout, rank, weights) for rank in range(layout.world_size)]
    for name, parts in holdings(model, layout).items():
        assert sum(math.prod(part.box.size) for part in parts) == weights[name].numel()
        for box, holders in ((part.box, part.ranks) for part in parts):
            expected = weights[name]
            for dim, (start, size) in enumerate(zip(box.start, box.size, strict=True)):
                expected = expected.narrow(dim, start, size)
            for rank in range(layout.world_size):
                if rank in holders:
                    assert torch.equal(ranks[rank].view(name, box.start, box.size), expected)
                else:
                    with pytest.raises(LookupError, match="does not hold"):
                        ranks[rank].view(name, box.start, box.size)


def test_a_box_inside_a_part():
    weights = make_weights(DENSE)
    name, rank = (
        "model.layers.0.self_attn.o_proj.weight",
        local_weights(DENSE, Layout(tp=2), 1, make_weights(DENSE)),
    )
    assert torch.equal(rank.view(name, (2, 5), (3, 2)), weights[name][2:5, 5:7])
    with pytest.raises(LookupError):
        rank.view(name, (2, 3), (3, 2))  # partly the other rank's
