"""How tensors are cut into buckets of shared memory. (That their bytes arrive is parity/test_roundtrip.py.)"""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.bridge.transfer import ALIGNMENT, Bucket, Entry, plan_buckets


def offsets(buckets: list[tuple[Entry, ...]]) -> list[list[tuple[str, int]]]:
    return [[(entry.name, entry.offset) for entry in bucket] for bucket in buckets]


def test_buckets_by_hand():
    shapes = {"a": (4, 5), "b": (3,), "c": (16, 2), "d": (1000,), "e": (1,)}  # 80, 12, 128, 4000, 4 bytes in fp32
    assert offsets(plan_buckets(shapes, 4, 256)) == [[("a", 0), ("b", 128)], [("c", 0)], [("d", 0)], [("e", 0)]]
    assert offsets(plan_buckets(shapes, 4, 320)) == [[("a", 0), ("b", 128), ("c", 192)], [("d", 0)], [("e", 0)]]
    assert offsets(plan_buckets(shapes, 2, 10**6)) == [[("a", 0), ("b", 64), ("c", 128), ("d", 192), ("e", 2240)]]
    assert offsets(plan_buckets(shapes, 4, 1)) == [[(name, 0)] for name in shapes]


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2), min_size=1, max_size=30),
    st.integers(1, 20000),
    st.sampled_from([2, 4]),
)
def test_every_tensor_once_in_order_without_overlap(shapes, bucket_bytes, item_size):
    named = {f"t{i}": tuple(shape) for i, shape in enumerate(shapes)}
    buckets = plan_buckets(named, item_size, bucket_bytes)
    assert [(e.name, e.shape) for bucket in buckets for e in bucket] == list(named.items())
    for bucket in buckets:
        end = 0
        for entry in bucket:
            assert entry.offset >= end and entry.offset % ALIGNMENT == 0
            end = entry.offset + math.prod(entry.shape) * item_size
        assert end <= bucket_bytes or len(bucket) == 1


def test_what_an_engine_is_told():
    bucket = Bucket(path="/proc/1/fd/3", dtype="fp32", entries=(Entry(name="a", shape=(2, 3), offset=64),), tensors={})
    assert bucket.update_info(7) == {"path": "/proc/1/fd/3", "tensors": [["a", "fp32", [2, 3], 64]], "version": 7}
