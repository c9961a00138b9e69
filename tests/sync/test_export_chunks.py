"""How the tensors of a checkpoint are cut into chunks, and which parts of them a rank holds."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.sync.export_chunks import cut, parts_by_chunk, region
from megatron_dapo.weights.slices import Shard, Slice


def test_chunks_by_hand():
    # 80, 12, 128, 4000, 4 bytes in fp32
    shapes = {"a": (4, 5), "b": (3,), "c": (16, 2), "d": (1000,), "e": (1,)}
    assert [list(chunk) for chunk in cut(shapes, 4, 219)] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [list(chunk) for chunk in cut(shapes, 4, 220)] == [["a", "b", "c"], ["d"], ["e"]]
    assert [list(chunk) for chunk in cut(shapes, 2, 10**6)] == [["a", "b", "c", "d", "e"]]
    assert [list(chunk) for chunk in cut(shapes, 4, 1)] == [[name] for name in shapes]


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2), min_size=1, max_size=30),
    st.integers(1, 20000),
    st.sampled_from([2, 4]),
)
def test_every_tensor_once_in_order(shapes, chunk_bytes, item_size):
    named = {f"t{i}": tuple(shape) for i, shape in enumerate(shapes)}
    chunks = cut(named, item_size, chunk_bytes)
    assert [item for chunk in chunks for item in chunk.items()] == list(named.items())
    for chunk in chunks:
        used = sum(math.prod(shape) * item_size for shape in chunk.values())
        assert used <= chunk_bytes or len(chunk) == 1


def test_a_shard_of_two_tensors_in_different_chunks():
    chunks = cut({"a": (4, 2), "b": (2,), "c": (3, 2)}, 4, 1)
    stacked = Shard("m", torch.arange(10.0).view(5, 2), (Slice("c", 0, 1, 0, 2), Slice("a", 0, 1, 2, 3)))
    columns = Shard("n", torch.tensor([[7.0], [8.0], [9.0]]), (Slice("c", 1, 1, 0, 1),))
    in_a, in_b, in_c = parts_by_chunk(chunks, [stacked, columns])
    assert [part.values().tolist() for part in in_a] == [[[4, 5], [6, 7], [8, 9]]]
    assert in_b == []
    assert [part.values().tolist() for part in in_c] == [[[0, 1], [2, 3]], [[7], [8], [9]]]
    whole = {"a": torch.zeros(4, 2)}
    region(whole, in_a[0].slice).copy_(in_a[0].values())
    assert whole["a"].tolist() == [[0, 0], [4, 5], [6, 7], [8, 9]]
