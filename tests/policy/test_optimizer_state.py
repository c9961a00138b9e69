"""Runs of elements cut into rectangles. What is made of them is tested in tests/invariance/test_resume.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.policy.optimizer_state import rectangles


@pytest.mark.parametrize(
    "shape, start, end, expected",
    [
        ((7,), 2, 5, [((2,), (3,))]),
        ((3, 4), 0, 12, [((0, 0), (3, 4))]),
        ((3, 4), 4, 8, [((1, 0), (1, 4))]),
        ((3, 4), 5, 7, [((1, 1), (1, 2))]),
        ((3, 4), 2, 12, [((0, 2), (1, 2)), ((1, 0), (2, 4))]),
        ((4, 4), 3, 13, [((0, 3), (1, 1)), ((1, 0), (2, 4)), ((3, 0), (1, 1))]),
        ((3, 4), 6, 9, [((1, 2), (1, 2)), ((2, 0), (1, 1))]),
        ((3, 4), 6, 6, []),
        ((3, 4), 8, 6, []),
    ],
)
def test_by_hand(shape, start, end, expected):
    assert list(rectangles(shape, start, end)) == expected


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_rectangles_hold_each_element_once_and_in_order(shape, data):
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    end = data.draw(st.integers(start, total))
    elements = torch.arange(total).view(shape)
    found = []
    for offsets, sizes in rectangles(tuple(shape), start, end):
        part = elements
        for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            part = part.narrow(axis, offset, size)
        found += part.reshape(-1).tolist()
    assert found == list(range(start, end))


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_a_matrix_needs_three_at_most(rows, columns, data):
    start = data.draw(st.integers(0, rows * columns))
    end = data.draw(st.integers(start, rows * columns))
    assert len(list(rectangles((rows, columns), start, end))) <= 3
