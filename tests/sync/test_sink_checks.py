"""The checks on hand-made tables: one fault each, and the sentence that names it. Tables with faults of real
loaders are in test_sinks_bugs.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dapo.sync.sink_checks import (
    coverage_problems,
    naming_problems,
    place_of,
    problems,
    scale_problems,
    source_problems,
)
from megatron_dapo.sync.sinks import Padding, Sink, SinkTable

QKV, DOWN = "layers.3.self_attn.qkv_proj.weight", "layers.3.mlp.down_proj.weight"
SHAPES = {
    "layers.3.self_attn.q_proj.weight": (4, 4),
    "layers.3.self_attn.k_proj.weight": (2, 4),
    "layers.3.self_attn.v_proj.weight": (2, 4),
    "layers.3.mlp.down_proj.weight": (4, 6),
}


def table(rank: int) -> SinkTable:
    """A worker of two: queries of two rows each, one key and one value row, three columns."""
    rows = [("q_proj", 2, 0), ("k_proj", 1, 8), ("v_proj", 1, 12)]
    sinks = [
        Sink(QKV, f"layers.3.self_attn.{name}.weight", (n * rank, 0), (n, 4), offset, (4, 1))
        for name, n, offset in rows
    ]
    return SinkTable(
        sinks=(*sinks, Sink(DOWN, DOWN, (0, 3 * rank), (4, 3), 0, (3, 1))),
        dtypes={QKV: "float32", DOWN: "float32"},
        shapes={QKV: (4, 4), DOWN: (4, 3)},
        tp=2,
        tp_rank=rank,
    )


def changed(table: SinkTable, number: int, **change) -> SinkTable:
    sinks = list(table.sinks)
    sinks[number] = replace(sinks[number], **change)
    return replace(table, sinks=tuple(sinks))


def test_nothing_is_wrong():
    assert problems([table(0), table(1)], SHAPES) == []


def test_problems_come_with_their_rank():
    found = problems([table(0), changed(table(1), 3, source="layers.2.mlp.down_proj.weight")], SHAPES)
    assert len(found) == 2
    assert found[0].startswith(
        "tp rank 1, pp rank 0: layers.3.mlp.down_proj.weight takes elements of layers.2."
    )
    assert found[1] == "layers.3.mlp.down_proj.weight: 12 of 24 elements are taken by no rank"


@pytest.mark.parametrize(
    ("number", "change", "expected"),
    [
        (0, {"size": (1, 4)}, [f"{QKV}: 4 of 16 elements are never written"]),
        (
            2,
            {"offset": 8},
            [
                f"{QKV}: 4 elements are written again by layers.3.self_attn.v_proj.weight",
                f"{QKV}: 4 of 16 elements are never written",
            ],
        ),
        (
            2,
            {"offset": 10},  # half of the key's row, half of the value's
            [
                f"{QKV}: 2 elements are written again by layers.3.self_attn.v_proj.weight",
                f"{QKV}: 2 of 16 elements are never written",
            ],
        ),
        (
            3,
            {"stride": (2, 1)},
            [f"{DOWN}: 3 elements are written again by {DOWN}", f"{DOWN}: 3 of 12 elements"],
        ),
        (
            2,
            {"offset": 13},
            [f"{QKV}: written by layers.3.self_attn.v_proj.weight outside", f"{QKV}: 4 of 16"],
        ),
    ],
)
def test_coverage(number, change, expected):
    found = coverage_problems(changed(table(0), number, **change))
    assert len(found) == len(expected)
    assert all(problem.startswith(text) for problem, text in zip(found, expected, strict=True)), found


def test_padding_covers_and_must_not_be_written():
    padded = replace(
        table(0), shapes={QKV: (4, 4), DOWN: (5, 3)}, padding=(Padding(DOWN, 12, (1, 3), (3, 1), 0.0),)
    )
    assert coverage_problems(padded) == []
    assert coverage_problems(replace(padded, padding=())) == [f"{DOWN}: 3 of 15 elements are never written"]
    assert coverage_problems(replace(padded, shapes=table(0).shapes))[0].startswith(
        f"{DOWN}: written by padding outside of its storage"
    )
    over = replace(padded, padding=(Padding(DOWN, 9, (2, 3), (3, 1), 0.0),))
    assert coverage_problems(over) == [f"{DOWN}: 3 elements are written again by {DOWN}"]


def test_a_computed_parameter_is_the_loaders_alone():
    computed = replace(table(0), computed={DOWN: "neg"}, whole=(DOWN,))
    assert coverage_problems(computed) == [f"{DOWN} is computed by its loader and written by a sink as well"]
    alone = [
        replace(t, computed={DOWN: "neg"}, whole=(DOWN,), sinks=t.sinks[:3]) for t in (table(0), table(1))
    ]
    assert problems(alone, SHAPES) == []


def test_sources():
    shared = changed(table(1), 1, start=(0, 0))  # both ranks take the first key
    assert source_problems([table(0), shared], SHAPES) == [
        "layers.3.self_attn.k_proj.weight: 4 of 8 elements are taken by no rank"
    ]
    assert source_problems([table(0), table(1)], {**SHAPES, "lm_head.weight": (3, 4)}) == [
        "lm_head.weight: 12 of 12 elements are taken by no rank"
    ]
    crossed = [replace(table(0), tp_rank=1), replace(table(1), tp_rank=0)]
    assert [text.partition(":")[0] for text in source_problems(crossed[::-1], SHAPES)] == [
        QKV,
        QKV,
        QKV,
        DOWN,
    ]


@pytest.mark.parametrize("ranks", [[0], [0, 0], [0, 1, 1]])
def test_there_is_one_table_of_each_rank(ranks):
    tables = [table(rank) for rank in ranks]
    expected = [(0, rank) for rank in ranks]
    assert source_problems(tables, {}) == [
        f"the tables are of the (pp, tp) ranks {expected} instead of [(0, 0), (0, 1)]"
    ]
    assert source_problems([table(1), table(0)], SHAPES) == []


def test_the_order_of_parts():
    first, second, third, down = table(0).sinks
    swapped = (first, replace(second, offset=12), replace(third, offset=8), down)
    [problem] = naming_problems(replace(table(0), sinks=swapped))
    assert problem.startswith(
        f"{QKV}: its parts lie out of order: layers.3.self_attn.q_proj.weight, layers.3.self_attn.v"
    )


EXPERTS = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("parameter", "source", "place"),
    [
        ("model.norm.weight", "model.norm.weight", (0, 0)),
        ("model.norm.weight", "model.norm.bias", None),
        ("l.1.self_attn.qkv_proj.bias", "l.1.self_attn.v_proj.bias", (0, 2)),
        ("l.1.self_attn.qkv_proj.bias", "l.1.self_attn.v_proj.weight", None),
        ("l.1.self_attn.qkv_proj.bias", "l.2.self_attn.v_proj.bias", None),
        ("l.1.self_attn.qkv_proj.weight", "l.1.self_attn.o_proj.weight", None),
        ("l.1.mlp.gate_up_proj.weight_scale_inv", "l.1.mlp.up_proj.weight_scale_inv", (0, 1)),
        (f"{EXPERTS}.routed_experts.w13_weight", f"{EXPERTS}.12.up_proj.weight", (12, 1)),
        (f"{EXPERTS}.w13_weight", f"{EXPERTS}.12.gate_proj.weight", (12, 0)),
        (f"{EXPERTS}.w2_weight_scale_inv", f"{EXPERTS}.7.down_proj.weight_scale_inv", (7, 0)),
        (f"{EXPERTS}.w2_weight", f"{EXPERTS}.7.down_proj.bias", None),
        (f"{EXPERTS}.w2_weight", f"{EXPERTS}.7.up_proj.weight", None),
        (f"{EXPERTS}.w2_weight", "model.layers.2.mlp.experts.7.down_proj.weight", None),
        (f"{EXPERTS}.w2_weight", "model.layers.1.mlp.experts.x.down_proj.weight", None),
    ],
)
def test_where_a_source_belongs(parameter, source, place):
    assert place_of(parameter, source) == place


def test_experts_lie_in_order_within_a_rank_and_over_the_ranks():
    w2 = f"{EXPERTS}.w2_weight"

    def of(rank: int, *experts: int) -> SinkTable:
        sinks = [
            Sink(w2, f"{EXPERTS}.{e}.down_proj.weight", (0, 0), (2, 3), 6 * i, (3, 1))
            for i, e in enumerate(experts)
        ]
        shapes, dtypes = {w2: (len(experts), 2, 3)}, {w2: "float32"}
        return SinkTable(tuple(sinks), dtypes, shapes, tp=2, tp_rank=rank, ep=2, ep_rank=rank)

    shapes = {f"{EXPERTS}.{e}.down_proj.weight": (2, 3) for e in range(12)}
    assert problems([of(0, *range(6)), of(1, *range(6, 12))], shapes) == []
    assert problems([of(0, *range(0, 12, 2)), of(1, *range(1, 12, 2))], shapes) == []  # one by one
    assert "out of order" in problems([of(0, 0, 1, 2, 4, 3, 5), of(1, *range(6, 12))], shapes)[0]
    [crossed] = problems([of(0, *range(6, 12)), of(1, *range(6))], shapes)
    assert crossed.startswith(f"{w2}: the tp ranks take their parts out of order")


SCALE, BLOCKS = "layers.3.self_attn.attn.k_scale", "layers.3.mlp.down_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("parameter", "shape", "of_checkpoint", "fine"),
    [
        (SCALE, (), {BLOCKS: (1, 1)}, True),
        (SCALE, (), {}, False),  # not of an engine in block FP8
        (SCALE, (1,), {BLOCKS: (1, 1)}, False),
        ("layers.3.self_attn.attn.sink_scale", (), {BLOCKS: (1, 1)}, False),
        ("layers.3.self_attn.k_scale", (), {BLOCKS: (1, 1)}, False),
    ],
)
def test_scalars_that_a_checkpoint_need_not_have(parameter, shape, of_checkpoint, fine):
    of_engine = SinkTable((), {parameter: "float32"}, {parameter: shape})
    found = [line for line in problems([of_engine], of_checkpoint) if "never written" in line]
    expected = f"tp rank 0, pp rank 0: {parameter}: 1 of 1 elements are never written"
    assert found == ([] if fine else [expected])


def test_a_scalar_that_may_be_unset_is_checked_when_it_is_written():
    sink = Sink(SCALE, DOWN, (), (), 0, ())
    of_engine = SinkTable((sink, sink), {SCALE: "float32"}, {SCALE: ()})
    again = f"{SCALE}: 1 elements are written again by {DOWN}"
    assert any(line.endswith(again) for line in problems([of_engine], {BLOCKS: (1, 1)}))


def test_block_fp8_is_only_copied():
    norm = "model.norm.weight"
    whole = SinkTable((), {}, {}, whole=(BLOCKS, DOWN, norm))
    found = scale_problems(whole, {BLOCKS: (1, 1), DOWN: (4, 6), norm: (4,)})
    assert [line.partition(" is in block FP8")[0] for line in found] == [BLOCKS, DOWN]
    assert scale_problems(whole, {norm: (4,)}) == [found[0]]
