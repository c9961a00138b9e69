"""Strided regions as boxes: against torch's own views, and boxes without boxes against masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.sync.regions import MappedBox, Region, boxes_of, without


def region(tensor: torch.Tensor) -> Region:
    return Region(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def block(tensor: torch.Tensor, box: MappedBox) -> torch.Tensor:
    return tensor[tuple(slice(low, low + n) for low, n in zip(box.start, box.size, strict=True))]


@st.composite
def views(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """A small tensor of different numbers, and some view of it."""
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    whole = view = torch.arange(math.prod(shape)).reshape(shape)
    for kind in draw(
        st.lists(st.sampled_from(["t", "narrow", "step", "flat", "expand", "select"]), max_size=4)
    ):
        if kind == "flat" and view.is_contiguous():
            view = view.view(-1)
        elif kind == "expand" and view.dim() < 4:
            view = view.expand(2, *view.shape)
        elif view.dim():
            dim = draw(st.integers(0, view.dim() - 1))
            low = draw(st.integers(0, view.shape[dim] - 1))
            if kind == "t":
                view = view.transpose(0, dim)
            elif kind == "narrow":
                view = view.narrow(dim, low, draw(st.integers(1, view.shape[dim] - low)))
            elif kind == "step":
                view = view[(slice(None),) * dim + (slice(low, None, 2),)]
            elif kind == "select":
                view = view.select(dim, low)
    return whole, view


@settings(max_examples=300, deadline=None)
@given(views(), st.booleans())
def test_boxes_copy_what_the_view_copies(case, is_transposed):
    whole, view = case
    storage = torch.full((view.numel(),), -1)
    target = storage.view(view.shape)
    if is_transposed:
        target = storage.view(view.shape[::-1]).permute(tuple(reversed(range(view.dim()))))
    boxes = list(boxes_of(region(view), tuple(whole.shape), region(target)))
    for box in boxes:
        storage.as_strided(box.size, box.stride, box.offset).copy_(block(whole, box))
    assert torch.equal(target, view)
    assert sum(box.num_elements for box in boxes) == view.numel()


@pytest.mark.parametrize(
    ("view", "number"),
    [
        (lambda x: x, 1),
        (lambda x: x[1:3], 1),
        (lambda x: x[:, 2:5], 1),
        (lambda x: x.t(), 1),
        (lambda x: x.view(-1), 1),
        (lambda x: x.view(2, 2, 2, 3), 1),
        (lambda x: x[::2], 2),
        (lambda x: x[:, ::2], 3),  # columns, not elements
        (lambda x: x.view(-1)[3:9], 6),  # the end of a row and the start of the next
        (lambda x: x.expand(5, 4, 6), 5),
    ],
)
def test_as_few_boxes_as_there_can_be(view, number):
    whole = torch.arange(24).view(4, 6)
    here = region(view(whole))
    assert len(list(boxes_of(here, (4, 6), region(torch.empty(here.size))))) == number


def test_a_region_outside_of_the_tensor_is_refused():
    with pytest.raises(ValueError, match="does not lie inside a tensor of shape"):
        list(boxes_of(Region(20, (5,), (1,)), (4, 6), Region(0, (5,), (1,))))
    assert list(boxes_of(Region(24, (0,), (1,)), (4, 6), Region(0, (0,), (1,)))) == []


spans = st.tuples(st.integers(0, 3), st.integers(1, 4))
boxes = st.lists(spans, min_size=2, max_size=2).map(
    lambda dims: MappedBox(*map(tuple, zip(*dims, strict=True)))
)


@given(boxes, st.lists(boxes, max_size=4))
def test_what_is_left_of_a_box(box, others):
    expected = torch.zeros(8, 8, dtype=torch.int)
    block(expected, box).fill_(1)
    left = [box]
    for other in others:
        block(expected, other).fill_(0)
        left = without(left, other)
    found = torch.zeros_like(expected)
    for piece in left:
        assert min(piece.size) > 0
        block(found, piece).add_(1)  # 2 where pieces overlap
    assert torch.equal(found, expected)


def test_what_two_boxes_have_in_common():
    box = MappedBox((2, 0), (4, 6), 100, (10, 1))
    assert box.common(MappedBox((3, 4), (9, 9))) == MappedBox((3, 4), (3, 2), 114, (10, 1))
    assert box.common(MappedBox((6, 0), (1, 6))) is None
