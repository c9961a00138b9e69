"""A push with replicas that fail in every phase: who commits, who is left behind, what is said about it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pytest
from support.replicas import HOST, Client, EngineDied, Fleet
from support.targets import Targets

from megatron_dapo.errors import UserError
from megatron_dapo.sync import publish as publish_file
from megatron_dapo.sync.manifest import Manifest
from megatron_dapo.sync.plan import Worker
from megatron_dapo.sync.publish import Failure, Publisher, PublishReport, Verify
from megatron_dapo.sync.sinks import Sink, SinkTable

NUM_ROUNDS = 3
SHAPES = {"model.norm.weight": (4,)}
SINK = Sink("model.norm.weight", "model.norm.weight", (0,), (4,), 0, (1,))
TABLE = SinkTable((SINK,), {"model.norm.weight": "float32"}, {"model.norm.weight": (4,)})

DEATH = EngineDied("the engine at http://x is gone")
TIMEOUT = TimeoutError("http://x/update_weights did not answer within 600 s")


class Exchange:
    """Rounds of 0, 1 and 2 bytes a worker; notes its workers, who takes part, and how far it was walked. It
    loses the engines `loses` in the round of that number.
    """

    def __init__(self, loses: Collection[str] = (), loses_in_round: int = 0) -> None:
        self.workers: list[Worker] = []
        self.walked: list[int] = []
        self.engines: list[list[str]] = []
        self.verified: list[bool] = []
        self.lost: dict[str, str] = {}
        self.loses, self.loses_in_round = loses, loses_in_round

    def set_workers(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)

    def rounds(
        self, weights: Any, version: int, *, engines: Collection[str], verify: bool
    ) -> Iterator[Mapping[str, list[Manifest]]]:
        self.engines.append(list(engines))
        self.verified.append(verify)
        self.lost = {}
        for number in range(NUM_ROUNDS):
            if number == self.loses_in_round:
                self.lost = {name: "host1 is gone" for name in self.loses}
            manifest = Manifest(
                version=version,
                table=TABLE.digest,
                path="/memory",
                offset=0,
                num_bytes=number,
                dtype_whole="float32",
                pieces=(),
            )
            following = {*engines} - self.lost.keys()
            yield {w.engine: [manifest] for w in self.workers if w.engine in following}
        self.walked.append(NUM_ROUNDS)


WHOLE = ["tables", "start", "update [0] of 5", "update [1] of 5", "update [2] of 5", "finish 5"]


def client(fails_at: str = "", error: BaseException | None = None) -> Client:
    return Client(fails_at, error, [TABLE])


def make_publisher(exchange: Any, verify: Verify = "first") -> Publisher:
    return Publisher(exchange, lambda value: value, shapes=SHAPES, dtype="float32", verify=verify)


def publish(fleet: Fleet | None, version: int = 5) -> PublishReport:
    exchange = Exchange()
    report = make_publisher(exchange).publish([], version, fleet)
    assert exchange.walked == [NUM_ROUNDS]  # whatever becomes of the replicas
    return report


def test_all_replicas_get_every_chunk_and_commit():
    fleet = Fleet(a=client(), b=client())
    assert publish(fleet) == PublishReport(version=5, committed=("a", "b"))
    assert fleet.clients["a"].calls == fleet.clients["b"].calls == WHOLE
    assert fleet.ready == {"a": 5, "b": 5} and fleet.failed == []


@pytest.mark.parametrize(
    ("fails_at", "phase"),
    [
        ("tables", "begin"),
        ("start", "begin"),
        ("update [0]", "send"),
        ("update [2]", "send"),
        ("finish 5", "commit"),
    ],
)
@pytest.mark.parametrize("error", [DEATH, TIMEOUT], ids=["death", "timeout"])
def test_a_replica_that_fails_gets_no_more_and_the_others_commit(fails_at, phase, error):
    fleet = Fleet(a=client(), b=client(fails_at, error), c=client())
    report = publish(fleet)
    assert report.committed == ("a", "c") and fleet.ready == {"a": 5, "c": 5}
    assert [(failure.name, failure.phase) for failure in report.failures] == [("b", phase)]
    assert fleet.failed == [("b", phase, error)]
    assert fleet.clients["a"].calls == fleet.clients["c"].calls == WHOLE
    reached = next(i for i, call in enumerate(WHOLE) if call.startswith(fails_at))
    if fails_at == "update [0]":
        reached += 1  # the next round is under way while it loads this one
    assert fleet.clients["b"].calls == WHOLE[: reached + 1]


def test_a_round_is_under_way_while_the_one_before_is_loaded():
    """And no more than one: its memory is that of the round before the last."""

    class Slow(Client):
        async def update_weights(self, info: list[dict[str, Any]]) -> None:
            number = len(sent)
            sent.append(number)
            async with asyncio.timeout(5):
                while number + 1 < NUM_ROUNDS and len(sent) < number + 2:
                    await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)  # time for a third one, which must not come
            assert len(sent) - len(loaded) <= 2
            loaded.append(number)

    sent, loaded = list[int](), list[int]()
    targets = Targets({"a": Slow("", None, [TABLE])})
    try:
        make_publisher(Exchange()).publish([], 5, targets)
    finally:
        targets.close()
    assert sorted(loaded) == list(range(NUM_ROUNDS))


def test_a_death_and_a_time_out_are_called_what_they_are():
    fleet = Fleet(
        a=client("start", DEATH), b=client("update [1]", TIMEOUT), c=client("finish 5", TimeoutError())
    )
    assert [str(failure) for failure in publish(fleet).failures] == [
        "a failed when the weight push began: EngineDied: the engine at http://x is gone",
        "b timed out while it received weights: http://x/update_weights did not answer within 600 s",
        "c timed out when the weight push was committed: it did not answer within the time-out",
    ]


def test_two_die_at_once():
    fleet = Fleet(a=client("update [1]", DEATH), b=client("update [1]", DEATH), c=client())
    report = publish(fleet)
    assert report.committed == ("c",)
    assert [failure.name for failure in report.failures] == ["a", "b"]
    assert [name for name, _, _ in fleet.failed] == ["a", "b"]
    assert fleet.clients["a"].calls == fleet.clients["b"].calls == WHOLE[:5]


def test_all_die_one_after_another():
    fleet = Fleet(a=client("start", DEATH), b=client("finish 5", TIMEOUT))
    report = publish(fleet)
    assert report.committed == () and fleet.ready == {}
    assert report.failures == (
        Failure(name="a", phase="begin", error=f"EngineDied: {DEATH}", timed_out=False),
        Failure(name="b", phase="commit", error=str(TIMEOUT), timed_out=True),
    )


def test_nobody_to_push_to_and_ranks_without_replicas():
    assert publish(Fleet()) == publish(None) == PublishReport(version=5)


def test_the_next_push_goes_to_the_restarted_replica_again():
    fleet, exchange = Fleet(a=client(), b=client("update [0]", DEATH)), Exchange()
    publisher = make_publisher(exchange)
    publisher.publish([], 5, fleet)
    workers = [Worker(engine=name, rank=0, host=HOST, device=i, table=TABLE) for i, name in enumerate("ab")]
    assert exchange.workers == workers
    assert publisher.publish([], 6, fleet).committed == ("a",)  # b is not up yet
    assert exchange.workers == workers and exchange.engines == [["a", "b"], ["a"]]
    fleet.clients["b"] = client()
    fleet.targets.append("b")
    assert publisher.publish([], 7, fleet) == PublishReport(version=7, committed=("a", "b"))
    assert fleet.ready == {"a": 7, "b": 7} and exchange.engines[2] == ["a", "b"]
    assert fleet.clients["a"].calls.count("tables") == 1  # a was asked once, and the new b too
    assert fleet.clients["b"].calls.count("tables") == 1


def test_pieces_are_told_once_to_whoever_has_committed():
    fleet, exchange = Fleet(a=client(), b=client("update [1]", DEATH)), Exchange()
    publisher = make_publisher(exchange)
    publisher.publish([], 5, fleet)
    old = fleet.clients["b"]
    fleet.clients["b"] = client()
    fleet.targets.append("b")
    publisher.publish([], 6, fleet)
    publisher.publish([], 7, fleet)
    assert fleet.clients["a"].told == [True] * NUM_ROUNDS + [False] * 2 * NUM_ROUNDS
    assert old.told == [True] * NUM_ROUNDS
    assert fleet.clients["b"].told == [True] * NUM_ROUNDS + [False] * NUM_ROUNDS  # restarted: told again


def test_pieces_are_told_again_when_the_engines_are_others():
    fleet, publisher = Fleet(a=client()), make_publisher(Exchange())
    publisher.publish([], 5, fleet)
    fleet.clients["b"] = client()
    fleet.targets.append("b")
    publisher.publish([], 6, fleet)
    assert fleet.clients["a"].told == [True] * 2 * NUM_ROUNDS  # another plan may cut chunks otherwise


@pytest.mark.parametrize("number", range(NUM_ROUNDS))
def test_engines_whose_host_is_lost_get_nothing_more_and_the_others_commit(number):
    fleet, exchange = Fleet(a=client(), b=client(), c=client()), Exchange(["b", "c"], number)
    report = make_publisher(exchange).publish([], 5, fleet)
    assert report.committed == ("a",) and fleet.ready == {"a": 5}
    assert [str(failure) for failure in report.failures] == [
        f"{name} failed while it received weights: ConnectionError: host1 is gone" for name in "bc"
    ]
    assert [(name, phase) for name, phase, _ in fleet.failed] == [("b", "send"), ("c", "send")]
    assert fleet.clients["b"].calls == fleet.clients["c"].calls == WHOLE[: 2 + number]


def test_of_an_engine_that_fails_and_is_lost_the_first_is_said():
    fleet, exchange = Fleet(a=client(), b=client("update [0]", DEATH)), Exchange(["b"], 1)
    report = make_publisher(exchange).publish([], 5, fleet)
    assert [failure.error for failure in report.failures] == ["ConnectionError: host1 is gone"]
    assert report.committed == ("a",)


def test_a_replica_that_has_left_is_sent_nothing_any_more():
    fleet, exchange = Fleet(a=client(), b=client()), Exchange()
    publisher = make_publisher(exchange)
    publisher.publish([], 5, fleet)
    del fleet.clients["b"]
    fleet.targets = ["a"]
    assert publisher.publish([], 6, fleet).committed == ("a",)
    assert [worker.engine for worker in exchange.workers] == ["a"]
    fleet.clients["b"], fleet.targets = client(), ["a", "b"]  # another one of that name tells its tables
    assert publisher.publish([], 7, fleet).committed == ("a", "b")
    assert fleet.clients["b"].calls[0] == "tables"


def test_a_replica_that_leaves_as_the_push_begins_is_left_behind():
    fleet, exchange = Fleet(a=client(), b=client()), Exchange()
    where = fleet.where
    fleet.where = lambda name: None if name == "b" else where(name)  # type: ignore[method-assign]
    report = make_publisher(exchange).publish([], 5, fleet)
    assert report.committed == ("a",) and exchange.engines == [["a"]]
    assert [str(failure) for failure in report.failures] == [
        "b failed while it received weights: ConnectionError: it has left the run"
    ]


def test_an_engine_that_would_not_take_all_weights_is_refused_before_it_gets_any():
    half = dataclasses.replace(TABLE, sinks=(SINK.part((0,), (2,)),))
    fleet = Fleet(a=client(), b=Client(tables=[half]))
    with pytest.raises(UserError, match=r"b would not take .* 2 of 4 elements are never written"):
        make_publisher(Exchange()).publish([], 5, fleet)
    assert fleet.clients["a"].calls == fleet.clients["b"].calls == ["tables"]


def test_many_engines_that_are_alike_are_checked_once_and_share_their_tables(monkeypatch):
    checked = []
    monkeypatch.setattr(publish_file, "problems", lambda tables, shapes: checked.append(tables) or [])
    fleet, exchange = Fleet(**{f"engine_{i}": client() for i in range(32)}), Exchange()
    make_publisher(exchange).publish([], 5, fleet)
    assert len(checked) == 1 and len({id(worker.table) for worker in exchange.workers}) == 1
    assert len(exchange.workers) == 32


def test_an_engine_of_another_version_is_named():
    class Newer(Client):
        async def sink_tables(self, shapes: Any, dtype: str) -> list[Any]:
            return [TABLE.to_json() | {"format": 99}]

    with pytest.raises(UserError, match=r"a has told a sink table that .* be used: .*format=99 is"):
        make_publisher(Exchange()).publish([], 5, Fleet(a=Newer()))


@pytest.mark.parametrize(
    ("verify", "expected"),
    [("never", [False] * 4), ("first", [True, False, False, False]), (2, [True, False, True, False])],
)
def test_which_pushes_are_verified(verify, expected):
    exchange = Exchange()
    publisher = make_publisher(exchange, verify)
    for version in range(4):
        publisher.publish([], version, Fleet(a=client()))
    assert exchange.verified == expected


@pytest.mark.parametrize("method", ["push_targets", "begin_call", "set_failed"])
def test_a_mistake_of_the_rollout_wing_is_raised_after_all_rounds(method):
    fleet = Fleet(a=client(), b=client("update [0]", DEATH))

    def mistaken(*args: Any) -> Any:
        raise KeyError("mistake")

    setattr(fleet, method, mistaken)
    exchange = Exchange()
    with pytest.raises(KeyError, match="mistake"):
        make_publisher(exchange).publish([], 5, fleet)
    assert exchange.walked == [NUM_ROUNDS]
    assert fleet.ready == {}
