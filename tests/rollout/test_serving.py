"""Hosts that join a run and leave it, by what both sides say through a store: fake servers and clients."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.engines import FakeClient, FakeServer
from support.service import Grading, Stream

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout import files, hosts, serving
from megatron_dapo.rollout.fleet import EngineFailure, Fleet
from megatron_dapo.rollout.hosts import SILENT_S, EngineHost
from megatron_dapo.rollout.service import RolloutService
from megatron_dapo.rollout.serving import SETTINGS, Membership, ServingHosts, open_to, settings


class Child:
    """A server of a host."""

    def __init__(self, index: int) -> None:
        self.name, self.url, self.is_running = f"engine_{index}", f"http://10.0.0.2:{8000 + index}", False

    def start(self) -> None:
        self.is_running = True

    def poll(self) -> int | None:
        return None if self.is_running else 0

    def stop(self) -> None:
        self.is_running = False

    def log_tail(self) -> str:
        return "  | last words"

    async def wait_healthy(self, timeout: float) -> None:
        raise AssertionError("rank 0 asks the server itself")


def cut_off(side: Any) -> None:
    """As if its process were gone: the connections of its lifeline end without a word."""
    for peer in side._lifeline._peers:
        peer.sock.shutdown(socket.SHUT_RDWR)


class Place:
    """A run without engines of its own, and hosts that join it."""

    def __init__(self, **rollout: Any) -> None:
        values = {"colocated": False, "engines": 2, "tensor_parallel": 2} | rollout
        self.config = RunConfig.make({"model": {"path": "model"}, "rollout": values})
        self.store, self.now, self.messages = dist.HashStore(), 0.0, list[str]()
        self.fleet = Fleet(self.config.rollout, [], self._connect, message=self.messages.append)
        self.run = ServingHosts(
            self.config,
            self.store,
            "token",
            self.fleet,
            num_engines=4,
            message=self.messages.append,
            clock=lambda: self.now,
        )
        self.children: dict[int, Child] = {}
        self.engine_hosts: list[EngineHost] = []
        self.members: list[Membership] = []

    def member(self, host: str = "node7") -> Membership:
        """A host, with its engines, that has not joined."""
        member = Membership(self.store, host, self.config.rollout.engines, "127.0.0.1")
        self.members.append(member)
        made = EngineHost(self.store, member.name, member.engines, self._child)
        self.engine_hosts.append(made)
        return member

    def _connect(self, server: Any) -> FakeClient:
        return FakeClient(FakeServer(f"engine_{server.index}"))

    def _child(self, index: int, token: str) -> Any:
        assert token
        return self.children.setdefault(index, Child(index))

    @property
    def states(self) -> dict[str, str]:
        return {replica.name: str(replica.state) for replica in self.fleet.replicas}

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not holds():
                self.run.look()
                await asyncio.sleep(0.005)


@pytest.fixture
def make_place(monkeypatch):
    made: list[Place] = []

    async def healthy(server: Any, timeout: float) -> None:
        assert server.url.startswith("http://10.0.0.2")

    monkeypatch.setattr(hosts, "POLL_S", 0.002)
    monkeypatch.setattr(serving, "LOOK_S", 0.01)
    monkeypatch.setattr(hosts, "until_healthy", healthy)
    yield lambda **rollout: made.append(Place(**rollout)) or made[-1]
    for place in made:
        for made_here in (*place.engine_hosts, *place.members):
            made_here.close()
        if place.run._lifeline:
            place.run._lifeline.close()


@pytest.fixture
def place(make_place) -> Place:
    place = make_place()
    place.run.open()
    return place


async def test_hosts_join_with_numbers_of_their_own(place):
    first, second = place.member("node7"), place.member("node7")
    assert (first.name, first.engines) == ("serve 0 on node7", range(4, 6))
    assert (second.name, second.engines) == ("serve 1 on node7", range(6, 8))
    place.run.look()
    assert place.states == {}
    second.join()
    await place.until(lambda: list(place.states.values()) == ["stale"] * 2)
    first.join()
    await place.until(lambda: list(place.states.values()) == ["stale"] * 4)
    assert list(place.states) == ["engine_6", "engine_7", "engine_4", "engine_5"]
    where = [(replica.host, replica.device) for replica in place.fleet.replicas]
    assert where == [(second.name, 0), (second.name, 2), (first.name, 0), (first.name, 2)]
    assert place.messages[:2] == [
        "serve 1 on node7 has joined with engine_6, engine_7",
        "serve 0 on node7 has joined with engine_4, engine_5",
    ]
    await asyncio.wait_for(place.fleet.wait_ready(), 2)


async def test_a_host_leaves_when_its_requests_have_ended(place):
    first, second = place.member("node7"), place.member("node8")
    first.join()
    second.join()
    await place.until(lambda: list(place.states.values()) == ["stale"] * 4)
    for replica in place.fleet.replicas:
        place.fleet.set_ready(replica.name, 0)
    for replica in place.fleet.replicas[:2]:
        replica.client.held = {0}
    running = asyncio.ensure_future(place.fleet.generate([0], n=1, seed_of=lambda version: 0))
    await asyncio.sleep(0.01)
    first.leave()
    await place.until(lambda: any("leaves" in line for line in place.messages))
    await asyncio.sleep(0.05)
    assert (first.look(), second.look()) == ("joined", "joined") and place.children[4].is_running
    for replica in place.fleet.replicas[:2]:
        replica.client.held.clear()
    await running
    await place.until(lambda: first.look() == "left")
    assert first.refused == "" and list(place.states) == ["engine_6", "engine_7"]
    assert [child.is_running for _, child in sorted(place.children.items())] == [False, False, True, True]
    assert place.messages[-1] == "serve 0 on node7 has left"
    assert not any("fail" in line or "again" in line for line in place.messages)


async def test_a_host_that_falls_silent_costs_its_engines(place):
    first, second = place.member(), place.member()
    first.join()
    second.join()
    await place.until(lambda: list(place.states.values()) == ["stale"] * 4)
    place.engine_hosts[0].close()  # no sign of life from here on
    place.run.look()
    place.now += SILENT_S + 1
    place.store.add(hosts.alive_key(second.name), 1)
    await place.until(lambda: list(place.states) == ["engine_6", "engine_7"])
    lines = [line for line in place.messages if "engine_4" in line]
    assert "engine_4 failed while serving: serve 0 on node7 has given no sign of life for 30 s" in lines[-1]
    assert first.look() == "left" and first.refused == "serve 0 on node7 has given no sign of life for 30 s"


async def test_a_host_that_needs_too_many_files_is_refused(place, monkeypatch):
    asked = []

    def refuse(needed: int) -> None:
        asked.append(needed)
        raise UserError("ulimit -n")

    monkeypatch.setattr(serving, "raise_file_limit", refuse)
    member = place.member()
    member.join()
    place.run.look()
    assert member.look() == "left" and member.refused == "ulimit -n" and place.states == {}
    assert asked == [serving.file_descriptors_needed(place.config.rollout, 1)]
    assert files.raise_file_limit is not refuse


async def test_a_run_that_ends_tells_its_hosts_and_waits_until_they_know(place):
    member = place.member()
    member.join()
    await place.until(lambda: place.states)
    closing = asyncio.create_task(place.run.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    assert member.look() == "ended"
    await asyncio.wait_for(closing, 2)


async def test_each_notices_when_the_other_is_gone(place):
    """By the lifeline, at once: neither the store nor a thread of the other says so."""
    first, second = place.member("node7"), place.member("node8")
    for member in (first, second):
        member.join()
    await place.until(lambda: len(place.states) == 4)
    assert (first.look(), second.look()) == ("joined", "joined")
    cut_off(first)
    await place.until(lambda: list(place.states) == ["engine_6", "engine_7"])
    assert first.look() == "left" and re.match(r"serve 0 on node7 on .* has ended without", first.refused)
    assert second.lost == ""
    cut_off(place.run)
    await place.until(lambda: second.lost)
    assert second.lost.startswith("the run is gone: rank 0 on ")


async def test_a_held_interpreter_on_rank_0_costs_no_host(place, monkeypatch):
    """Rank 0 looks at nothing for longer than a host may be silent; the lifeline knows that it is there."""
    member = place.member()
    clock = [100.0]
    monkeypatch.setattr(serving.time, "monotonic", lambda: clock[0])
    member.join()
    place.run.look()
    member.look()
    clock[0] += 100 * SILENT_S
    assert member.look() == "joined" and member.lost == ""


async def test_a_host_that_is_never_let_in_gives_up(place, monkeypatch):
    member = place.member()
    clock = [time.monotonic()]
    monkeypatch.setattr(serving.time, "monotonic", lambda: clock[0])
    clock[0] += serving.CLOCKS.held_s - 1
    assert member.lost == ""
    clock[0] += 2
    assert member.lost == "rank 0 has given no sign of life within 300 s"


@pytest.mark.parametrize("joins", [False, True])
async def test_too_few_engines_in_time_end_the_run_and_say_how_to_join(make_place, joins):
    place = make_place(min_engines=3, start_timeout_s=60)
    place.run.open()
    if joins:
        place.member().join()
    place.run.look()
    place.now = 61
    place.run.look()
    words = rf"{2 * joins} of rollout.min_engines=3 engines have joined within 60 s; .*megatron_dapo.serve"
    with pytest.raises(EngineFailure, match=words):
        await place.fleet.wait_ready()


async def test_a_fault_of_the_code_ends_the_run_with_its_traceback(place, monkeypatch):
    monkeypatch.setattr(place.fleet, "add", lambda replica: 1 / 0)
    place.member().join()
    await asyncio.wait_for(place.run.watch(), 2)
    with pytest.raises(ZeroDivisionError):
        await place.fleet.wait_ready()


def test_the_service_takes_hosts_in_and_tells_them_of_its_end(make_place, monkeypatch, tmp_path):
    place = make_place()
    monkeypatch.setattr(RolloutService, "_connect", lambda service, server: place._connect(server))
    config = place.config.model_copy(
        update={"run": place.config.run.model_copy(update={"dir": str(tmp_path)})}
    )
    service = RolloutService(
        config,
        folder=tmp_path,
        stop_token_ids=(1,),
        prompts=Stream(),
        grading=Grading(),
        store=dist.PrefixStore("ranks", place.store),
        message=place.messages.append,
    )
    service.start()
    try:
        assert service.replica_states() == {} and open_to(place.store, config)
        member = place.member()
        member.join()
        service.wait_ready()
        assert service.replica_states() == {"engine_0": "stale", "engine_1": "stale"}
        assert service.where("engine_1") == (member.name, 2) and service.where("engine_2") is None
        looking = threading.Thread(target=lambda: until(lambda: member.look() == "ended"))
        looking.start()
    finally:
        service.close()
    looking.join(5)
    assert not looking.is_alive() and not any(child.is_running for child in place.children.values())


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)


# --- which host may join


def test_a_run_is_open_when_it_says_so(make_place):
    place = make_place()
    assert not open_to(place.store, place.config)
    place.run.open()
    assert open_to(place.store, place.config)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_differs_is_named(make_place, name):
    place = make_place()
    place.run.open()
    section, field = name.split(".")
    value = getattr(getattr(place.config, section), field)
    other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else "fp32"
    changed = place.config.model_copy(
        update={section: getattr(place.config, section).model_copy(update={field: other})}
    )
    with pytest.raises(UserError, match=rf"{name}={other} differs from {value} of the run"):
        open_to(place.store, changed)


def test_what_only_a_host_has_may_differ(make_place):
    place = make_place()
    place.run.open()
    own = {"engines": 4, "tensor_parallel": 2, "memory_utilization": 0.5}
    other = RunConfig.make(
        {"model": {"path": str(Path("elsewhere"))}, "run": {"dir": "other"}, "rollout": own}
    )
    assert open_to(place.store, other)
    assert settings(other) == settings(place.config)
