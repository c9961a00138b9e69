"""What lies in a chunk, and what its worker is told about it."""

from __future__ import annotations

import pytest
import torch
import xxhash

from megatron_dapo.sync.chunks import checksum, manifests, pack
from megatron_dapo.sync.manifest import Piece
from megatron_dapo.sync.plan import Copy, Message, Parcel, Plan, Worker
from megatron_dapo.sync.sinks import Sink, SinkTable
from megatron_dapo.sync.sources import LocalWeights
from megatron_dapo.weights.slices import Shard, Slice

# Rows 1 and 2 of a, and all of b, which is sent whole.
SINK = Sink("p", "a", (1, 0), (2, 3), 0, (3, 1))
TABLE = SinkTable((SINK,), {"p": "bfloat16"}, {"p": (2, 3)}, whole=("b",), computed={"q": "neg"})
B = Sink("b", "b", (0,), (2,), 0, (1,))
PARCEL = Parcel((0,), "bfloat16", 0, 16, (Copy(SINK, 0, 0), Copy(B, None, 12)))
A_VALUES, B_VALUES = torch.arange(12.0).view(4, 3), torch.tensor([0.1, -7.0])
WEIGHTS = LocalWeights(
    [Shard("m", A_VALUES, (Slice("a", 0, 0, 0, 4),)), Shard("n", B_VALUES, (Slice("b", 0, 0, 0, 2),))]
)


def test_elements_are_cast_and_lie_end_to_end():
    chunk = torch.zeros(16, dtype=torch.uint8)
    pack(PARCEL, WEIGHTS, chunk)
    expected = torch.tensor([3, 4, 5, 6, 7, 8, 0.1, -7], dtype=torch.bfloat16)
    assert torch.equal(chunk.view(torch.bfloat16), expected)
    found = checksum(PARCEL, chunk)
    assert (found.offset, found.num_bytes) == (0, 16)
    assert found.xxh3 == xxhash.xxh3_64_hexdigest(expected.view(torch.uint8).numpy().tobytes())


@pytest.fixture
def plan() -> Plan:
    workers = [
        Worker(engine=name, rank=0, host="h", device=i, table=TABLE) for i, name in enumerate(("x", "y"))
    ]
    rounds = tuple(Message(0, number, PARCEL) for number in (0, 1)), (Message(0, 1, PARCEL),)
    return Plan(workers=tuple(workers), rank_hosts=("h",), carriers=(0, 0), rounds=rounds)


def test_what_workers_are_told(plan):
    (x1, y1), (x2, y2) = manifests(plan, lambda number, w: (f"/m{w}", 64 * number + w), "bfloat16")
    assert x1.pieces == (
        Piece(sink=0, source=None, start=(1, 0), size=(2, 3), offset=0),
        Piece(sink=None, source="b", start=(0,), size=(2,), offset=12),
    )
    assert [(m.path, m.offset, m.num_bytes) for m in (x1, y1, x2, y2)] == [
        ("/m0", 0, 16),
        ("/m1", 1, 16),
        ("/m0", 64, 0),
        ("/m1", 65, 16),
    ]
    assert (x2.pieces, x2.table, x1.dtype_whole) == ((), TABLE.digest, "bfloat16")


def test_workers_that_get_the_same_share_the_list_of_it(plan):
    (x1, y1), (_, y2) = manifests(plan, lambda *_: ("/m", 0), "bfloat16")
    assert x1.pieces is y1.pieces is y2.pieces and x1.digest == y1.digest
