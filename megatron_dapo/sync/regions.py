"""Arithmetic of strided regions and boxes. A *region* is what `as_strided` addresses in a storage; a *box* is
a block of consecutive indices in every dimension of a row-major tensor, with the region it corresponds to
elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """storage.as_strided(size, stride, offset), all in elements."""

    offset: int
    size: Ints
    stride: Ints


@dataclass(frozen=True, slots=True)
class MappedBox:
    """[start, start + size) of a tensor, which corresponds to the region (offset, size, stride) of another
    storage.
    """

    start: Ints
    size: Ints
    offset: int = 0
    stride: Ints = ()

    @property
    def num_elements(self) -> int:
        return math.prod(self.size)

    @property
    def region(self) -> Region:
        return Region(self.offset, self.size, self.stride)

    def common(self, other: MappedBox) -> MappedBox | None:
        """What both boxes hold, with this box's region of it."""
        start = tuple(map(max, self.start, other.start))
        size = tuple(min(ends) - low for *ends, low in zip(self._end, other._end, start, strict=True))
        if any(n <= 0 for n in size):
            return None
        steps = zip(start, self.start, self.stride or (0,) * len(start), strict=True)
        moved = sum((new - old) * step for new, old, step in steps)
        return replace(self, start=start, size=size, offset=self.offset + moved)

    def minus(self, other: MappedBox) -> list[MappedBox]:
        """This box without the other, as disjoint boxes (without regions)."""
        if self.common(other) is None:
            return [self]
        left, start, end = [], list(self.start), list(self._end)
        for dim, (low, high) in enumerate(zip(other.start, other._end, strict=True)):
            for first, last in ((start[dim], low), (high, end[dim])):
                if first < last:
                    corner = (*start[:dim], first, *start[dim + 1 :])
                    beyond = (*end[:dim], last, *end[dim + 1 :])
                    left.append(MappedBox(corner, tuple(map(int.__sub__, beyond, corner))))
            start[dim], end[dim] = max(start[dim], low), min(end[dim], high)
        return left

    @property
    def _end(self) -> Ints:
        return tuple(map(sum, zip(self.start, self.size, strict=True)))


def without(boxes: Iterable[MappedBox], other: MappedBox) -> list[MappedBox]:
    """All of `boxes` without `other`."""
    return [piece for box in boxes for piece in box.minus(other)]


def row_major(shape: Ints) -> Ints:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def boxes_of(region: Region, shape: Ints, also: Region) -> Iterator[MappedBox]:
    """Cut `region` of a contiguous tensor of `shape` into boxes; each carries the region that its elements
    have in `also`, which has the same size and is cut alike.

    ValueError when the region does not lie inside the tensor.
    """
    size, stride = region.size, region.stride
    last = region.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= math.prod(shape):
        raise ValueError(f"{region} does not lie inside a tensor of shape {shape}")
    if 0 not in size:
        dims = _along_axes(zip(size, stride, also.stride, strict=True), shape)
        yield from _boxes(region.offset, also.offset, dims, shape)


# A dimension of a region: number of elements, stride in the tensor, stride in the other storage.
Dim = tuple[int, int, int]


def _along_axes(dims: Iterable[Dim], shape: Ints) -> list[Dim]:
    """Dimensions of one element left out, and those that run over several axes of `shape` split by axis."""
    split = []
    for n, step, other in dims:
        while n > 1:
            part = n
            if found := _axis(step, shape):
                axis, steps = found
                room, rest = divmod(shape[axis], steps)  # indices of this dimension before the axis ends
                if rest == 0 and 1 < room < n and n % room == 0:
                    part = room
            split.append((part, step, other))
            n, step, other = n // part, step * part, other * part
    return split


def _axis(step: int, shape: Ints) -> tuple[int, int] | None:
    """The axis of `shape` that `step` elements move along, and how many indices of it."""
    for axis, (n, stride) in enumerate(zip(shape, row_major(shape), strict=True)):
        if n > 1 and stride <= step:
            return (axis, step // stride) if step % stride == 0 else None
    return None


def _boxes(offset: int, other: int, dims: list[Dim], shape: Ints) -> Iterator[MappedBox]:
    """One box if the region is one; else those of every index of a dimension that stands in the way."""
    found = _box(offset, other, dims, shape)
    if isinstance(found, MappedBox):
        yield found
        return
    n, step, other_step = found
    rest = [dim for dim in dims if dim is not found]
    for i in range(n):
        yield from _boxes(offset + i * step, other + i * other_step, rest, shape)


def _box(offset: int, other: int, dims: list[Dim], shape: Ints) -> MappedBox | Dim:
    """The region as a box, or a dimension of it that does not fit into one."""
    start, left = [], offset
    for stride in row_major(shape):
        start.append(left // stride)
        left %= stride
    size, strides = [1] * len(shape), [1] * len(shape)
    for dim in sorted(dims, key=lambda dim: dim[1]):
        n, step, other_step = dim
        if (found := _axis(step, shape)) is None:
            return dim
        axis, steps = found
        is_first = size[axis] == 1
        # the next dimension of an axis goes on where the one before it ends, in both storages
        goes_on = is_first or other_step == strides[axis] * size[axis]
        if steps != size[axis] or not goes_on or start[axis] + size[axis] * n > shape[axis]:
            return dim
        strides[axis] = other_step if is_first else strides[axis]
        size[axis] *= n
    return MappedBox(tuple(start), tuple(size), other, tuple(strides))
