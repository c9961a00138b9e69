"""Engines that sleep while the policy trains: the real service, clients and publisher against servers that
note every call in a wrong order (support/sleepy.py), also when one of them fails in any of the calls.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.service import Grading, Stream, make_config, positions, wait_until
from support.sleepy import PATHS, SleepyServer, make_publisher

from megatron_dapo import colocation
from megatron_dapo.colocation import Colocation
from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.rollout.errors import EngineDied, RequestFailed
from megatron_dapo.rollout.fleet import Fleet
from megatron_dapo.rollout.replica import Replica
from megatron_dapo.rollout.rollouts import WeightsNeeded
from megatron_dapo.rollout.service import RolloutService
from megatron_dapo.sync.publish import PublishReport

TIMEOUT_S = 1.0  # of a call
POLICY: Any = object()  # only handed on


class Run:
    """A run of one rank with `num` engines, without its policy."""

    def __init__(self, num: int, tmp_path: Any, patch: pytest.MonkeyPatch) -> None:
        config = make_config(tmp_path, seeded=False)
        self.servers = [SleepyServer(f"engine_{i}") for i in range(num)]
        self.messages: list[str] = []
        self.events: list[str] = []  # of the policy
        self.has_state = True  # the policy, on the devices
        for server in self.servers:
            server.may_start = lambda: not self.has_state
        rollout = config.rollout.model_copy(update={"engines": num})
        fleet = Fleet(
            rollout,
            [Replica(name=server.name, server=server) for server in self.servers],
            lambda server: EngineClient(server.url, "token", progress_timeout_s=TIMEOUT_S),
            message=self.messages.append,
        )
        parts = {"prompts": Stream(), "grading": Grading(), "fleet": fleet}
        self.service = RolloutService(config, folder=tmp_path, stop_token_ids=(1,), **parts)
        self.publisher = make_publisher()
        session: Any = SimpleNamespace(
            channel=SimpleNamespace(share=lambda: None), control=None, device=torch.device("cpu")
        )
        reporter = SimpleNamespace(message=self.messages.append)
        controller: Any = SimpleNamespace(service=self.service, reporter=reporter)
        self.colocation = Colocation(session, controller, takes_turns=True)
        patch.setattr(colocation, "to_device", self.to_device)
        patch.setattr(colocation, "to_host", self.to_host)
        patch.setattr(colocation.dist, "barrier", lambda group: self.events.append("barrier"))

    def to_device(self, policy: Any) -> None:
        assert policy is POLICY and not any(server.holds_memory for server in self.servers)
        self.has_state = True
        self.events.append("to_device")

    def to_host(self, policy: Any) -> None:
        assert policy is POLICY and not any(server.holds_memory for server in self.servers)
        self.has_state = False
        self.events.append("to_host")

    def start(self) -> None:
        """As the trainer does: engines up, asleep, the policy, the first push."""
        self.has_state = False
        self.service.start()
        self.service.wait_ready()
        self.colocation.to_policy(None)
        self.has_state = True
        self.colocation.to_engines(POLICY)
        self.publish(0)

    def publish(self, version: int) -> PublishReport:
        with self.service.paused() as replicas:
            return self.publisher.publish([], version, replicas)

    def collect(self, version: int) -> list[int]:
        """Positions of the groups of a step; weights are pushed again when no engine has them."""
        while True:
            try:
                return positions(self.service.next_step(version).groups)
            except WeightsNeeded:
                self.publish(version)

    def step(self, version: int) -> list[int]:
        found = self.collect(version)
        self.colocation.to_policy(POLICY)
        self.colocation.to_engines(POLICY)
        self.publish(version + 1)
        return found

    def all_serve(self, version: int) -> None:
        """Wait until every engine is up; push, and see that each takes requests."""
        wait_until(lambda: set(self.service.replica_states().values()) <= {"ready", "stale"})
        self.publish(version)
        assert set(self.service.replica_states().values()) == {"ready"}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Iterator[Callable[[int], Run]]:
    made: list[Run] = []

    def make(num: int) -> Run:
        made.append(Run(num, tmp_path, monkeypatch))
        return made[-1]

    yield make
    for one in made:
        one.service.close()
        assert [server.wrong for server in one.servers] == [[]] * len(one.servers)
        assert all(server.poll() is not None for server in one.servers)
    assert "rollout" not in {thread.name for thread in threading.enumerate()}


def test_engines_and_policy_take_turns_and_each_step_is_sampled_awake(run):
    it = run(2)
    it.start()
    assert [it.step(version) for version in range(2)] == [[0, 1, 2], [3, 4, 5]]
    sleeping = ["sleep", "wake weights", "begin", "send", "commit", "wake kv_cache"]
    first = sleeping[:2] + ["tables"] + sleeping[2:]
    for server in it.servers:
        assert server.calls == ["start", "generate", "init", *first, *["generate", *sleeping] * 2]
    assert it.events == ["to_host", "barrier"] + ["to_device", "to_host", "barrier"] * 2
    assert it.colocation.memory.keys() == {"policy_training", "policy_sampling"}
    assert sum("the engines sleep: rank 0 has" in line for line in it.messages) == 1


TRANSITIONS = ["sleep", "wake weights", "begin", "send", "commit", "wake kv_cache"]
PHASES = {
    "sleep": "falling asleep",
    "wake weights": "waking up for weights",
    "wake kv_cache": "waking up",
}


@pytest.mark.parametrize("kind", ["die", "refuse", "hang"])
@pytest.mark.parametrize("call", TRANSITIONS)
def test_an_engine_that_fails_in_a_transition_is_restarted_and_the_other_goes_on(run, call, kind):
    it = run(2)
    it.start()
    it.servers[0].strikes[call] = kind
    assert it.step(0) == [0, 1, 2]
    assert not it.servers[0].strikes
    assert it.step(1) == [3, 4, 5]  # whether or not the other one is up again
    assert [server.starts for server in it.servers] == [2, 1]
    phase = PHASES.get(call, f"weights were pushed ({call})")
    assert f"engine_0 failed while {phase}: " in "\n".join(it.messages)
    it.all_serve(2)
    assert it.step(2) == [6, 7, 8]


@pytest.mark.parametrize("call", TRANSITIONS)
def test_the_only_engine_fails_in_a_transition_and_gets_the_weights_when_it_is_back(run, call):
    it = run(1)
    it.start()
    it.servers[0].strikes[call] = "die"
    assert [it.step(version) for version in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert it.servers[0].starts == 2


def test_an_engine_that_dies_asleep_is_noticed_when_it_is_to_wake(run):
    it = run(2)
    it.start()
    it.collect(0)
    it.colocation.to_policy(POLICY)
    it.servers[0].strikes["wake weights"] = "die"
    it.colocation.to_engines(POLICY)
    assert it.publish(1).committed == ("engine_1",)


def test_an_engine_that_is_starting_when_the_policys_turn_comes_is_waited_for(run):
    it = run(2)
    it.start()
    it.servers[0].is_slow, it.servers[0].strikes["wake kv_cache"] = True, "die"
    it.step(0)  # engine_0 fails at its end, and is being started again
    it.collect(1)
    threading.Timer(0.3, lambda: setattr(it.servers[0], "is_slow", False)).start()
    it.colocation.to_policy(POLICY)
    assert it.servers[0].calls[-1] == "sleep"
    it.colocation.to_engines(POLICY)
    assert it.publish(2).committed == ("engine_0", "engine_1")


def test_engines_that_slept_have_no_weights_until_a_push_brings_them(run):
    it = run(2)
    it.start()
    it.collect(0)
    replicas = it.service.fleet.replicas
    assert [replica.version for replica in replicas] == [0, 0]
    it.colocation.to_policy(POLICY)
    it.colocation.to_engines(POLICY)
    assert [replica.version for replica in replicas] == [None, None]
    it.publish(1)
    assert [replica.version for replica in replicas] == [1, 1]


def test_engines_that_share_nothing_are_never_asked_to_sleep(run):
    it = run(1)
    it.colocation.takes_turns = False
    it.has_state = False
    it.service.start()
    it.service.wait_ready()
    it.publish(0)
    it.step(0)
    assert it.events == [] and not {"sleep", "wake weights", "wake kv_cache"} & set(it.servers[0].calls)


# --- the servers of these tests do notice


@pytest.mark.parametrize(
    ("calls", "wrong"),
    [
        (["generate", "sleep", "wake weights", "begin", "send", "commit", "wake kv_cache", "generate"], ""),
        (["sleep", "sleep"], "sleep: it is not idle"),
        (["sleep", "generate"], "generate: it has no weights"),
        (["sleep", "begin"], "begin: there is no room"),
        (["sleep", "wake kv_cache"], "wake kv_cache: it does not sleep, or there are no weights"),
        (["sleep", "wake weights", "wake weights"], "wake weights: they do not sleep"),
        (["sleep", "wake weights", "wake kv_cache"], "wake kv_cache: "),
        (["sleep", "wake weights", "generate"], "generate: it has no weights"),
        (["sleep", "wake weights", "begin", "wake kv_cache"], "wake kv_cache: "),
        (["wake weights"], "wake weights: they do not sleep"),
        (["send"], "send: no update was begun"),
    ],
)
async def test_a_wrong_order_is_noted_and_refused(calls, wrong):
    server = SleepyServer("engine_0")
    server.start()
    await server.wait_healthy(1)
    client = EngineClient(server.url, "token")
    does: dict[str, Callable[[], Any]] = {
        "generate": lambda: client.warm_up(1),
        "sleep": client.sleep,
        "wake weights": lambda: client.wake_up("weights"),
        "wake kv_cache": lambda: client.wake_up("kv_cache"),
        "begin": client.start_weight_update,
        "send": lambda: client.update_weights([]),
        "commit": lambda: client.finish_weight_update("1"),
    }
    try:
        for call in calls[:-1]:
            await does[call]()
        if wrong:
            with pytest.raises((RequestFailed, EngineDied)):
                await does[calls[-1]]()
        else:
            await does[calls[-1]]()
    finally:
        await client.close()
        await asyncio.to_thread(server.stop)
    assert len(server.wrong) == bool(wrong) and "".join(server.wrong).startswith(wrong)
    assert calls[-1].split()[0] in {*PATHS}
