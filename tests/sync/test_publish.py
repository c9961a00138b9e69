"""A push with replicas that fail in every phase: who commits, who is left behind, what is said about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from support.replicas import Client, EngineDied, Fleet

from megatron_dapo.sync.manifest import Entry, Manifest
from megatron_dapo.sync.publish import Failure, Publisher, PublishReport

NUM_CHUNKS = 3


DEATH = EngineDied("the engine at http://x is gone")
TIMEOUT = TimeoutError("http://x/update_weights did not answer within 600 s")


class Transport:
    """Chunks "t0", "t1", "t2" of no bytes; counts how far each push was walked through."""

    def __init__(self) -> None:
        self.walked: list[int] = []

    def chunks(self, shards: Sequence[Any], version: int) -> Iterator[Manifest]:
        for number in range(NUM_CHUNKS):
            entries = (Entry(name=f"t{number}", shape=(1,), offset=0),)
            yield Manifest(version=version, path="/memory", dtype="fp32", entries=entries)
        self.walked.append(NUM_CHUNKS)


WHOLE = ["start", "update t0 of 5", "update t1 of 5", "update t2 of 5", "finish 5"]


def publish(fleet: Fleet | None, version: int = 5) -> PublishReport:
    transport = Transport()
    report = Publisher(transport).publish([], version, fleet)
    assert transport.walked == [NUM_CHUNKS]  # whatever becomes of the replicas
    return report


def test_all_replicas_get_every_chunk_and_commit():
    fleet = Fleet(a=Client(), b=Client())
    assert publish(fleet) == PublishReport(version=5, committed=("a", "b"))
    assert fleet.clients["a"].calls == fleet.clients["b"].calls == WHOLE
    assert fleet.ready == {"a": 5, "b": 5} and fleet.failed == []


@pytest.mark.parametrize(
    ("fails_at", "phase"),
    [
        ("start", "begin"),
        ("update t0", "send"),
        ("update t2", "send"),
        ("finish 5", "commit"),
    ],
)
@pytest.mark.parametrize("error", [DEATH, TIMEOUT], ids=["death", "timeout"])
def test_a_replica_that_fails_gets_no_further_call_and_the_others_commit(fails_at, phase, error):
    fleet = Fleet(a=Client(), b=Client(fails_at, error), c=Client())
    report = publish(fleet)
    assert report.committed == ("a", "c") and fleet.ready == {"a": 5, "c": 5}
    assert [(failure.name, failure.phase) for failure in report.failures] == [("b", phase)]
    assert fleet.failed == [("b", phase, error)]
    assert fleet.clients["a"].calls == fleet.clients["c"].calls == WHOLE
    reached = next(i for i, call in enumerate(WHOLE) if call.startswith(fails_at))
    assert fleet.clients["b"].calls == WHOLE[: reached + 1]


def test_a_death_and_a_time_out_are_called_what_they_are():
    fleet = Fleet(
        a=Client("start", DEATH), b=Client("update t1", TIMEOUT), c=Client("finish 5", TimeoutError())
    )
    assert [str(failure) for failure in publish(fleet).failures] == [
        "a failed when the weight push began: EngineDied: the engine at http://x is gone",
        "b timed out while it received weights: http://x/update_weights did not answer within 600 s",
        "c timed out when the weight push was committed: it did not answer within the time-out",
    ]


def test_two_die_at_once():
    fleet = Fleet(a=Client("update t1", DEATH), b=Client("update t1", DEATH), c=Client())
    report = publish(fleet)
    assert report.committed == ("c",)
    assert [failure.name for failure in report.failures] == ["a", "b"]
    assert [name for name, _, _ in fleet.failed] == ["a", "b"]
    assert fleet.clients["a"].calls == fleet.clients["b"].calls == WHOLE[:3]


def test_all_die_one_after_another():
    fleet = Fleet(a=Client("start", DEATH), b=Client("finish 5", TIMEOUT))
    report = publish(fleet)
    assert report.committed == () and fleet.ready == {}
    assert report.failures == (
        Failure(name="a", phase="begin", error=f"EngineDied: {DEATH}", timed_out=False),
        Failure(name="b", phase="commit", error=str(TIMEOUT), timed_out=True),
    )


def test_nobody_to_push_to_and_ranks_without_replicas():
    assert publish(Fleet()) == publish(None) == PublishReport(version=5)


def test_the_next_push_goes_to_the_restarted_replica_again():
    fleet = Fleet(a=Client(), b=Client("update t0", DEATH))
    publish(fleet)
    assert publish(fleet, version=6).committed == ("a",)  # b is not up yet
    fleet.clients["b"] = Client()
    fleet.targets.append("b")
    assert publish(fleet, version=7) == PublishReport(version=7, committed=("a", "b"))
    assert fleet.ready == {"a": 7, "b": 7}


@pytest.mark.parametrize("method", ["push_targets", "call", "set_failed"])
def test_a_mistake_of_the_rollout_wing_is_raised_after_all_chunks(method):
    fleet = Fleet(a=Client(), b=Client("update t0", DEATH))

    def mistaken(*args: Any) -> Any:
        raise KeyError("mistake")

    setattr(fleet, method, mistaken)
    transport = Transport()
    with pytest.raises(KeyError, match="mistake"):
        Publisher(transport).publish([], 5, fleet)
    assert transport.walked == [NUM_CHUNKS]
    assert fleet.ready == {}
