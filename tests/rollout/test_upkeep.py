"""Replicas that come and go while the run goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.engines import Engines, FakeServer

from megatron_dapo.rollout.errors import EngineDied
from megatron_dapo.rollout.fleet import EngineFailure, Fleet
from megatron_dapo.rollout.replica import Replica


async def generate(fleet: Fleet, prompt: int, n: int = 1) -> list:
    return await fleet.generate([prompt], n=n, seed_of=lambda version: version)


def join(engines: Engines, index: int, **options: Any) -> FakeServer:
    server = FakeServer(f"engine_{index}", **options)
    engines.servers.append(server)
    engines.fleet.add(Replica(name=server.name, server=server, host="elsewhere"))
    return server


def names(engines: Engines) -> list[str]:
    return [replica.name for replica in engines.fleet.replicas]


async def lives() -> bool:
    return True


async def is_gone() -> bool:
    return False


# --- coming


async def test_one_that_comes_serves_after_the_next_push():
    engines = Engines(num=1)
    fleet = await engines.started(version=3)
    join(engines, 1)
    assert engines.states == ["ready", "starting"]
    await engines.until(lambda: engines.states == ["ready", "stale"])
    await asyncio.gather(*(generate(fleet, prompt) for prompt in range(4)))
    assert engines.client(1).started == []
    engines.push(4)
    await asyncio.gather(*(generate(fleet, prompt) for prompt in range(4, 8)))
    assert engines.client(1).started and await fleet.push_targets() == ["engine_0", "engine_1"]
    await fleet.close()
    assert not engines.servers[1].is_running


async def test_a_run_without_engines_waits_for_some():
    engines = Engines(num=1)
    [replica] = engines.fleet.replicas
    engines.fleet.replicas.clear()
    await engines.fleet.start()
    ready = asyncio.ensure_future(engines.fleet.wait_ready())
    await asyncio.sleep(0.01)
    assert not ready.done()
    engines.fleet.add(replica)
    await asyncio.wait_for(ready, 2)


# --- leaving


async def test_one_that_leaves_ends_its_requests_and_gets_no_more():
    engines, out = Engines(num=2), []
    fleet = await engines.started()
    first = engines.client(0)
    first.held = {0}
    running = asyncio.ensure_future(generate(fleet, 0))
    await engines.until(lambda: first.started == [0])
    fleet.leave(["engine_0"], lambda: out.append(True))
    await asyncio.gather(*(generate(fleet, prompt) for prompt in range(1, 6)))
    assert first.started == [0] and not out and engines.states == ["draining", "ready"]
    first.held.clear()
    assert len(await running) == 1
    await engines.until(lambda: bool(out))
    assert names(engines) == ["engine_1"] and first.is_closed and not engines.servers[0].is_running
    assert not fleet.request_failures and engines.servers[0].starts == 1
    assert fleet._upkeep._budget.grant() and not any("fail" in line for line in engines.messages)


@pytest.mark.parametrize("keep", [False, True])
async def test_it_stays_as_long_as_weights_are_pushed_and_gets_them(keep):
    engines, out = Engines(num=2), []
    fleet = await engines.started()
    first = engines.client(0)
    first.held = {0} if keep else set()
    running = asyncio.ensure_future(generate(fleet, 0))
    await engines.until(lambda: first.started == [0])
    await fleet.pause(keep=keep)
    fleet.leave(["engine_0"], lambda: out.append(True))
    await asyncio.sleep(0.01)
    assert not out and await fleet.push_targets() == ["engine_0", "engine_1"]
    engines.push(1)
    assert engines.states == ["draining", "ready"] and fleet.replicas[0].version == 1
    await fleet.resume(kept=keep)
    await asyncio.gather(*(generate(fleet, prompt) for prompt in range(1, 6)))
    first.held.clear()
    await engines.until(lambda: bool(out))
    await running
    assert names(engines) == ["engine_1"] and first.started == [0]


async def test_a_push_comes_when_only_one_that_leaves_has_the_weights():
    engines = Engines(num=1)
    fleet = await engines.started()
    engines.client(0).held = {0}
    running = asyncio.ensure_future(generate(fleet, 0))
    join(engines, 1)
    await engines.until(lambda: engines.states == ["ready", "stale"])
    fleet.leave(["engine_0"], lambda: None)
    waiting = asyncio.ensure_future(generate(fleet, 1))
    await asyncio.wait_for(fleet.router.weights_needed.wait(), 2)
    engines.push(1)
    await waiting
    engines.client(0).held.clear()
    await running


async def test_one_that_leaves_while_it_starts_is_stopped():
    engines, out = Engines(num=1), []
    fleet = await engines.started()
    server = join(engines, 1, is_slow=True, bad_starts=1)
    await engines.until(lambda: server.is_running)
    fleet.leave(["engine_1"], lambda: out.append(True))
    server.is_slow = False  # it ends, since it was stopped
    await engines.until(lambda: bool(out))
    assert names(engines) == ["engine_0"] and server.starts == 1 and not engines.messages


async def test_one_that_leaves_and_fails_is_not_started_again():
    engines, out = Engines(num=2), []
    fleet = await engines.started()
    engines.client(0).held = {0}
    running = asyncio.ensure_future(generate(fleet, 0))
    await engines.until(lambda: engines.client(0).started == [0])
    fleet.leave(["engine_0"], lambda: out.append(True))
    fleet.set_failed("engine_0", "a test", EngineDied("gone"))
    await engines.until(lambda: bool(out))
    assert len(await running) == 1 and 0 in engines.client(1).finished
    assert names(engines) == ["engine_1"] and engines.servers[0].starts == 1


async def test_the_last_ones_to_leave_end_the_run():
    engines, out = Engines(num=2, rollout={"min_engines": 2}), []
    fleet = await engines.started()
    fleet.leave(["engine_1"], lambda: out.append(True))
    await engines.until(lambda: bool(out))
    with pytest.raises(EngineFailure, match="1 of 1 engines live, fewer than .*=2, and engine_1 has left"):
        await generate(fleet, 0)


async def test_a_call_to_one_that_has_left_is_its_failure():
    engines = Engines(num=2)
    fleet = await engines.started()
    fleet.lose(["engine_1"], "its host is gone")
    await engines.until(lambda: names(engines) == ["engine_0"])

    async def what(name: str, client: object) -> str:
        return name

    results = await fleet.call(["engine_0", "engine_1"], what)
    assert results["engine_0"] == "engine_0" and "it has left" in str(results["engine_1"])
    fleet.set_ready("engine_1", 5)
    fleet.set_failed("engine_1", "a push", EngineDied("gone"))
    assert fleet.version == 5 and names(engines) == ["engine_0"]


# --- lost


async def test_a_lost_host_costs_its_engines_and_no_restart():
    engines = Engines(num=3, rollout={"max_restarts": 1})
    fleet = await engines.started()
    engines.client(1).held = {1}
    join(engines, 3, is_slow=True, bad_starts=9)
    running = [asyncio.ensure_future(generate(fleet, prompt)) for prompt in range(3)]
    await engines.until(lambda: engines.client(1).started == [1])
    fleet.lose(["engine_1", "engine_2", "engine_3"], "host1 is gone")
    engines.servers[3].is_slow = False
    await asyncio.gather(*running)
    await engines.until(lambda: names(engines) == ["engine_0"])
    assert [server.starts for server in engines.servers] == [1, 1, 1, 1]
    assert fleet._upkeep._budget.grant()
    assert sum("failed while serving: host1 is gone" in line for line in engines.messages) == 2


@pytest.mark.parametrize(("host_lives", "states"), [(lives, ["ready", "stale"]), (is_gone, ["ready"])])
async def test_one_that_fails_is_started_again_if_its_host_lives(host_lives, states):
    engines = Engines(num=2, rollout={"max_restarts": 1})
    fleet = await engines.started()
    fleet.replicas[1].host_lives = host_lives
    fleet.set_failed("engine_1", "a test", EngineDied("gone"))
    await engines.until(lambda: engines.states == states)
    assert fleet._upkeep._budget.grant() == (host_lives is is_gone)
