"""Every element of every sink arrives once: checked against counting single elements."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.sync.arrivals import Arrivals
from megatron_dapo.sync.manifest import Piece
from megatron_dapo.sync.sinks import Sink, SinkTable

# Rows 2 to 5 of a [9, 4] tensor below the rows of another, and a tensor that is sent whole.
TABLE = SinkTable(
    sinks=(Sink("p", "a", (0, 0), (2, 4), 0, (4, 1)), Sink("p", "b", (2, 0), (4, 4), 8, (4, 1))),
    dtypes={"p": "float32", "q": "float32"},
    shapes={"p": (6, 4), "q": (3,)},
    whole=("w",),
    computed={"q": "neg"},
)


def arrivals() -> Arrivals:
    return Arrivals(TABLE, {"w": (3,)})


def piece(key: int | str, start: tuple[int, ...], size: tuple[int, ...]) -> Piece:
    named = isinstance(key, str)
    return Piece(sink=None if named else key, source=key if named else None, start=start, size=size, offset=0)


def test_what_has_not_arrived_is_counted_by_parameter():
    update = arrivals()
    assert update.missing() == ["p got 0 of 24 elements", "w got 0 of 3 elements"]
    update.take(piece(0, (0, 0), (2, 4)))
    update.take(piece("w", (0,), (2,)))
    assert not update.is_complete("w") and update.is_complete(0)
    assert update.missing() == ["p got 8 of 24 elements", "w got 2 of 3 elements"]
    update.take(piece("w", (2,), (1,)))
    update.take(piece(1, (2, 0), (4, 4)))
    assert update.is_complete("w") and update.missing() == []


def test_where_a_piece_goes():
    update = arrivals()
    assert update.take(piece(1, (3, 1), (2, 2))) == Sink("p", "b", (3, 1), (2, 2), 13, (4, 1))
    assert update.take(piece("w", (1,), (2,))) == Sink("w", "w", (1,), (2,), 1, (1,))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (piece(2, (0, 0), (1, 1)), "a piece is of 2, which is no sink"),
        (piece("b", (2, 0), (1, 1)), "a piece is of 'b', which is no sink"),
        (piece(1, (1, 0), (1, 1)), r"b\[\(1, 0\) \+ \(1, 1\)\] is no part of the sink's box"),
        (piece("w", (2,), (2,)), r"w\[\(2,\) \+ \(2,\)\] is no part"),
        (piece(1, (5, 3), (1, 1)), r"b\[\(5, 3\) \+ \(1, 1\)\] for p came twice"),
        (piece(1, (2, 0), (4, 4)), "came twice"),
    ],
)
def test_what_makes_no_sense_is_refused_and_not_counted(wrong, words):
    update = arrivals()
    update.take(piece(1, (4, 2), (2, 2)))
    with pytest.raises(ValueError, match=words):
        update.take(wrong)
    assert update.missing()[0] == "p got 4 of 24 elements"
    update.take(piece(1, (2, 0), (4, 2)))
    update.take(piece(1, (2, 2), (2, 2)))
    assert update.is_complete(1)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4)), max_size=12
    )
)
def test_any_pieces_equal_counting_elements(boxes):
    update, seen = arrivals(), set()
    for row, column, height, width in boxes:
        height, width = min(height, 4 - row), min(width, 4 - column)
        elements = set(itertools.product(range(row, row + height), range(column, column + width)))
        new = piece(1, (2 + row, column), (height, width))
        if elements & seen:
            with pytest.raises(ValueError, match="twice"):
                update.take(new)
        else:
            update.take(new)
            seen |= elements
        assert update.is_complete(1) == (len(seen) == 16)
        assert update.missing()[0] == f"p got {len(seen)} of 24 elements"
