"""Sink tables as data: parts of sinks, JSON there and back, digests, filling."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.sync.sinks import Padding, Sink, SinkTable, fill

# A head of 5 rows on two ranks, padded to 3 rows each; a row-parallel matrix; a transposed one. Of rank 1.
HEAD = Sink("head", "lm_head", (3, 0), (2, 4), 0, (4, 1))
DOWN = Sink("down", "down_proj", (0, 2), (3, 2), 0, (2, 1))
TURNED = Sink("turned", "other", (0, 0), (2, 3), 0, (1, 2))
TABLE = SinkTable(
    sinks=(HEAD, DOWN, TURNED),
    dtypes={"head": "bfloat16", "down": "float32", "turned": "float32", "A": "float32"},
    shapes={"head": (3, 4), "down": (3, 2), "turned": (3, 2), "A": (7,)},
    whole=("A_log",),
    padding=(Padding("head", 8, (1, 4), (4, 1), 0.0),),
    computed={"A": "neg"},
    tp=2,
    tp_rank=1,
)


def test_sizes():
    assert TABLE.num_elements == 8 + 6 + 6
    assert TABLE.num_bytes == 2 * 8 + 4 * 6 + 4 * 6


def test_a_part_by_hand():
    assert DOWN.part((1, 3), (2, 1)) == Sink("down", "down_proj", (1, 3), (2, 1), 3, (2, 1))
    assert TURNED.part((1, 1), (1, 2)) == Sink("turned", "other", (1, 1), (1, 2), 3, (1, 2))
    assert HEAD.part(HEAD.start, HEAD.size) == HEAD
    for start, size in [((2, 0), (1, 1)), ((3, 0), (3, 1)), ((3, 3), (1, 2)), ((3, 0), (0, 1)), ((3,), (1,))]:
        with pytest.raises(ValueError, match=r"no part of|argument"):
            HEAD.part(start, size)


@given(st.data())
def test_parts_address_the_elements_of_the_whole(data):
    start, size = [], []
    for low, n in zip(TURNED.start, TURNED.size, strict=True):
        start.append(data.draw(st.integers(low, low + n - 1)))
        size.append(data.draw(st.integers(1, low + n - start[-1])))
    part = TURNED.part(tuple(start), tuple(size))
    storage = torch.arange(6)
    whole = storage.as_strided(TURNED.size, TURNED.stride, TURNED.offset)
    expected = whole[start[0] : start[0] + size[0], start[1] : start[1] + size[1]]
    assert torch.equal(storage.as_strided(part.size, part.stride, part.offset), expected)


def test_filling_by_hand():
    sources = {
        "lm_head": torch.arange(20.0).view(5, 4),
        "down_proj": torch.arange(12.0).view(3, 4),
        "other": torch.arange(6.0).view(2, 3),
    }
    parameters = {
        name: torch.full(shape, torch.nan, dtype=getattr(torch, TABLE.dtypes[name]))
        for name, shape in TABLE.shapes.items()
    }
    fill(TABLE, parameters, sources)
    assert parameters["head"].tolist() == [[12, 13, 14, 15], [16, 17, 18, 19], [0, 0, 0, 0]]
    assert parameters["down"].tolist() == [[2, 3], [6, 7], [10, 11]]
    assert parameters["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert parameters["A"].isnan().all()  # the loader's
    with pytest.raises(KeyError, match="other"):
        fill(TABLE, parameters, {name: sources[name] for name in ("lm_head", "down_proj")})


def test_json_there_and_back():
    text = json.dumps(TABLE.to_json())
    again = SinkTable.from_json(json.loads(text))
    assert again == TABLE and again.digest == TABLE.digest
    assert text.count("down_proj") == 1  # rows name tensors by number


def test_the_digest_is_of_the_content_and_not_of_the_order():
    turned = dataclasses.replace(
        TABLE, sinks=TABLE.sinks[::-1], dtypes=dict(reversed(TABLE.dtypes.items())), whole=TABLE.whole
    )
    assert turned.digest == TABLE.digest
    others = [
        dataclasses.replace(TABLE, **change)
        for change in (
            {"sinks": (HEAD, DOWN)},
            {"sinks": (HEAD, dataclasses.replace(DOWN, start=(0, 1)), TURNED)},
            {"dtypes": {**TABLE.dtypes, "A": "float64"}},
            {"shapes": {**TABLE.shapes, "A": (8,)}},
            {"whole": ()},
            {"padding": ()},
            {"computed": {}},
            {"tp_rank": 0},
            {"ep": 2},
        )
    ]
    assert len({table.digest for table in (TABLE, *others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"format=2 is unknown, this code reads 1"),
        ({"tp_rank": 2}, "tp_rank=2 must be a rank of tp=2"),
        ({"dtypes": {**TABLE.dtypes, "A": "float99"}}, r"dtypes\['A'\]='float99' is no dtype"),
        ({"dtypes": {**TABLE.dtypes, "B": "float32"}}, "only one of them has 'B'"),
        ({"sinks": (dataclasses.replace(HEAD, parameter="foot"),)}, r"sinks\[0\]\.parameter='foot'"),
        ({"sinks": (HEAD, dataclasses.replace(HEAD, size=(2, 0)))}, r"sinks\[1\]\.size=\(2, 0\)"),
        ({"sinks": (dataclasses.replace(HEAD, stride=(4,)),)}, r"sinks\[0\]: offset=0 and stride=\(4,\)"),
        ({"sinks": (dataclasses.replace(HEAD, offset=-1),)}, r"sinks\[0\]: offset=-1"),
        ({"sinks": (dataclasses.replace(HEAD, start=(-3, 0)),)}, r"sinks\[0\]\.start=\(-3, 0\)"),
        ({"sinks": (dataclasses.replace(HEAD, start=(3,)),)}, r"sinks\[0\]\.start=\(3,\)"),
        ({"padding": (Padding("head", 8, (True, 4), (4, 1), 0.0),)}, r"padding\[0\]\.size"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TABLE, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda j: j.update(format=2, more=1), "format=2 is unknown"),
        (lambda j: j.pop("format"), "format=None is unknown"),
        (lambda j: j.pop("whole"), "instead of .*'whole'"),
        (lambda j: j.update(more=1), "'more'.* instead of"),
        (lambda j: j["sinks"][0].pop(), "not enough values"),
        (lambda j: j["sinks"][0].__setitem__(1, 3), "row that cannot be read"),
        (lambda j: j["sinks"][0].__setitem__(0, -1), r"row that cannot be read: KeyError\(-1\)"),
        (lambda j: j["sinks"][0].__setitem__(2, 5), "row that cannot be read"),
        (lambda j: j["ranks"].append(1), "zip"),
    ],
)
def test_json_that_makes_no_sense_is_refused(change, message):
    value = copy.deepcopy(TABLE.to_json())
    change(value)
    with pytest.raises(ValueError, match=message):
        SinkTable.from_json(value)
    with pytest.raises(ValueError, match="must be an object"):
        SinkTable.from_json([1])
