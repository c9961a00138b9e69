"""What a plan costs, by hand: four ranks on two hosts, three workers, sixteen bytes each."""

from __future__ import annotations

import pytest

from megatron_dapo.sync.plan import Worker, make_plan
from megatron_dapo.sync.plan_report import H100, Bandwidths, report
from megatron_dapo.sync.regions import MappedBox
from megatron_dapo.sync.sinks import Sink, SinkTable
from megatron_dapo.sync.sources import Held

TABLE = SinkTable((Sink("p.w", "w", (0,), (4,), 0, (1,)),), dtypes={"p.w": "float32"}, shapes={"p.w": (4,)})
HELD = {"w": (Held(MappedBox((0,), (4,)), (1, 2, 3)),)}
SPEEDS = Bandwidths(same_rank=16.0, inside_host=8.0, between_hosts=4.0)


def a_report(*places: tuple[str, int], chunk_bytes: int = 1024, held=HELD, table=TABLE):
    workers = [
        Worker(engine=f"e{n}", rank=0, host=host, device=device, table=table)
        for n, (host, device) in enumerate(places)
    ]
    plan = make_plan(workers, held, ["a", "a", "b", "b"], chunk_bytes=chunk_bytes, dtype="float32")
    return report(plan, SPEEDS)


def test_bytes_by_link_rank_and_worker():
    result = a_report(("a", 1), ("a", 0), ("c", 0))  # from rank 1, 1 and 2
    assert result["bytes"] == {"same_rank": 16, "inside_host": 16, "between_hosts": 16, "total": 48}
    assert result["sent_by_rank"] == {
        "min": 0,
        "mean": 12.0,
        "max": 32,
        "max_over_mean": pytest.approx(32 / 12),
        "each": [0, 32, 16, 0],
    }
    assert result["received_by_worker"]["each"] == result["shard_by_worker"]["each"] == [16, 16, 16]
    assert result["ratio_bytes"] == 1.0
    counts = ("hosts", "ranks", "engines", "workers", "rounds", "messages")
    assert [result[name] for name in counts] == [3, 4, 3, 3, 1, 3]


def test_seconds_of_links_that_work_at_once():
    seconds = a_report(("a", 1), ("a", 0), ("c", 0))["seconds"]
    assert seconds == {
        "same_rank": 1.0,
        "inside_host": 2.0,
        "between_hosts": 4.0,
        "exchange": 4.0,
        "push": 5.0,  # and a second to copy the chunk into the parameters
    }


def test_the_busiest_end_of_a_link_counts():
    only_rank_3 = {"w": (Held(MappedBox((0,), (4,)), (3,)),)}
    sending = a_report(("c", 0), ("d", 0), held=only_rank_3)
    assert sending["seconds"]["between_hosts"] == 8.0  # one rank sends 32 bytes
    receiving = a_report(("a", 0), ("a", 2), held=only_rank_3)
    assert receiving["seconds"]["between_hosts"] == 8.0  # rank 0 carries for both workers


def test_a_chunk_travels_while_the_one_before_is_loaded():
    seconds = a_report(("c", 0), chunk_bytes=8)["seconds"]  # two rounds of 8 bytes from two of three ranks
    assert seconds["exchange"] == 2 + 2
    assert seconds["push"] == 2 + 2 + 0.5
    slow_load = a_report(("a", 1), chunk_bytes=8)["seconds"]
    assert (slow_load["exchange"], slow_load["push"]) == (1.0, 0.5 + 0.5 + 0.5)


def test_tensors_that_come_whole_count_above_the_shard():
    table = SinkTable(TABLE.sinks, dtypes=TABLE.dtypes, shapes=TABLE.shapes, whole=("w",))
    result = a_report(("a", 1), table=table)
    assert result["shard_by_worker"]["each"] == [16] and result["ratio_bytes"] == 2.0


def test_one_direction_of_an_h100():
    assert (H100.inside_host, H100.between_hosts) == (450e9, 50e9)
