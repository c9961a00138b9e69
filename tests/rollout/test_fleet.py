"""Faults stay where they happen: requests that fail, engines that die, hang or do not start."""

from __future__ import annotations

import asyncio

import pytest
from support.engines import Engines, FakeClient

from megatron_dapo.errors import UserError
from megatron_dapo.rollout.errors import EngineDied, EngineStalled, RequestFailed, RequestRefused
from megatron_dapo.rollout.fleet import EngineFailure, Fleet


async def generate(fleet: Fleet, prompt: int, n: int = 1) -> list:
    return await fleet.generate([prompt], n=n, seed_of=lambda version: 1000 * version + prompt)


async def generate_all(fleet: Fleet, number: int) -> list:
    async with asyncio.timeout(5):
        return await asyncio.gather(*(generate(fleet, prompt) for prompt in range(number)))


def started(engines: Engines, prompt: int) -> int:
    """How often a prompt was sent, to any engine."""
    clients = [client for clients in engines.clients.values() for client in clients]
    return sum(client.started.count(prompt) for client in clients)


# --- requests that fail on engines that work


@pytest.mark.parametrize("reason", ["server_error", "aborted", "not_a_number"])
async def test_a_failed_request_is_sent_to_another_replica_and_costs_nobody_else(reason):
    engines = Engines(num=2)
    fleet = await engines.started()
    engines.client(0).failures = {2: [RequestFailed("it says why", reason)]}
    completions = await generate_all(fleet, 6)
    assert len(completions) == 6
    assert [started(engines, prompt) for prompt in range(6)] == [1, 1, 2, 1, 1, 1]
    assert 2 in engines.client(0).started and 2 in engines.client(1).finished
    assert fleet.request_failures == {reason: 1}
    assert engines.states == ["ready", "ready"] and engines.servers[0].starts == 1
    assert any("engine_0 failed a request" in line and "it says why" in line for line in engines.messages)


async def test_a_request_that_fails_on_several_replicas_ends_the_run():
    engines = Engines(num=2)
    fleet = await engines.started()
    for index in (0, 1):
        engines.client(index).failures = {0: [RequestFailed("NaN", "not_a_number")] * 3}
    with pytest.raises(EngineFailure, match=r"failed 3 times.*engine_0: NaN.*engine_1: NaN"):
        await generate(fleet, 0)
    assert fleet.request_failures == {"not_a_number": 3}
    assert {0} == set(engines.client(0).started) == set(engines.client(1).started)


async def test_one_replica_may_fail_a_request_twice_and_not_three_times():
    engines = Engines(num=1)
    fleet = await engines.started()
    engines.client(0).failures = {
        0: [RequestFailed("a", "aborted")] * 2,
        1: [RequestFailed("b", "aborted")] * 3,
    }
    assert len(await generate(fleet, 0)) == 1
    with pytest.raises(EngineFailure, match="failed 3 times"):
        await generate(fleet, 1)


async def test_a_request_that_is_refused_is_not_sent_again():
    engines = Engines(num=2)
    fleet = await engines.started()
    engines.client(0).failures = {0: [RequestRefused("answered 400: too long")]}
    with pytest.raises(RequestRefused, match="too long"):
        await generate(fleet, 0)
    assert started(engines, 0) == 1


async def test_no_file_descriptor_left_is_not_a_dead_engine():
    engines = Engines(num=2)
    fleet = await engines.started()
    engines.client(0).failures = {0: [UserError("ulimit -n")]}
    with pytest.raises(UserError, match="ulimit -n"):
        await generate(fleet, 0)
    assert engines.states == ["ready", "ready"]


# --- engines that die or hang


@pytest.mark.parametrize(
    ("error", "reason"), [(EngineDied("gone"), "engine_died"), (EngineStalled("still"), "engine_stalled")]
)
async def test_a_dead_engine_costs_only_its_own_requests(error, reason):
    engines = Engines(num=2)
    fleet = await engines.started()
    engines.client(0).failures = {0: [error]}
    engines.client(0).held = {2, 4}  # in flight on it when it dies
    first = engines.client(0)
    await generate_all(fleet, 6)
    assert sorted(engines.client(1).finished) == list(range(6))
    assert [started(engines, prompt) for prompt in range(6)] == [2, 1, 2, 1, 2, 1]
    assert fleet.request_failures == {reason: 1, "engine_died": 3 if reason == "engine_died" else 2}
    await engines.until(lambda: engines.states == ["stale", "ready"])
    assert engines.servers[0].starts == 2 and first.is_closed
    [line] = [line for line in engines.messages if "engine_0 failed" in line]
    assert str(error) in line and "root cause in the log of engine_0" in line


async def test_a_restarted_engine_gets_nothing_before_a_push():
    engines = Engines(num=2)
    fleet = await engines.started(version=3)
    engines.client(0).failures = {0: [EngineDied("gone")]}
    await generate(fleet, 0)
    await engines.until(lambda: engines.states == ["stale", "ready"])
    await generate_all(fleet, 5)
    assert engines.client(0).started == []
    engines.push(4)
    assert engines.states == ["ready", "ready"]
    [completion] = await generate(fleet, 7)
    assert completion.weight_version == 4 and 7 in engines.client(0).started


async def test_two_engines_die_at_once_and_requests_wait_for_the_weights():
    engines = Engines(num=2)
    fleet = await engines.started()
    for index in (0, 1):
        engines.client(index).failures = {index: [EngineDied("gone")]}
    work = asyncio.ensure_future(generate_all(fleet, 4))
    await asyncio.wait_for(fleet.router.weights_needed.wait(), 2)
    await engines.until(lambda: engines.states == ["stale", "stale"])
    assert not work.done() and fleet.router.weights_needed.is_set()
    engines.push(1)
    assert len(await work) == 4 and not fleet.router.weights_needed.is_set()


async def test_a_late_failure_of_the_old_client_does_not_touch_the_new_engine():
    engines = Engines(num=2)
    fleet = await engines.started()
    old = engines.client(0)
    fleet.set_failed("engine_0", "a push", EngineDied("gone"))
    fleet.set_failed("engine_0", "a push", EngineDied("gone"))
    await engines.until(lambda: engines.states[0] == "stale")
    fleet._fail(fleet.replicas[0], old, "late", EngineDied("late"))
    assert engines.states == ["stale", "ready"] and engines.servers[0].starts == 2


# --- restarts: their budget, and how few engines are enough


async def test_the_run_goes_on_with_those_that_live_down_to_min_engines():
    engines = Engines(num=3, rollout={"max_restarts": 0, "min_engines": 2})
    fleet = await engines.started()
    engines.client(0).failures = {0: [EngineDied("gone")]}
    await generate(fleet, 0)
    await engines.until(lambda: any("left out" in line for line in engines.messages))
    assert engines.states == ["dead", "ready", "ready"]
    assert "goes on with 2 of 3 engines" in engines.messages[-1]
    await generate_all(fleet, 4)

    engines.client(1).failures = {0: [EngineDied("gone too")]}
    engines.client(1).held = engines.client(2).held = {1}
    others = asyncio.ensure_future(generate(fleet, 1))
    with pytest.raises(EngineFailure) as caught:
        while True:
            await generate(fleet, 0)
    for words in ("1 of 3 engines live", "rollout.min_engines=2", "rollout.max_restarts=0 is used up"):
        assert words in str(caught.value)
    assert "root cause in the log of engine_0" in str(caught.value)
    assert "root cause in the log of engine_1" in str(caught.value)
    others.cancel()
    with pytest.raises(EngineFailure):  # and so does everything that comes later
        await generate(fleet, 5)


async def test_restarts_count_within_the_last_hour():
    engines = Engines(num=2, rollout={"max_restarts": 1})
    fleet = await engines.started()

    async def kill(index: int) -> None:
        engines.push(0)
        fleet.set_failed(f"engine_{index}", "a test", EngineDied("gone"))
        await engines.until(lambda: engines.states[index] in ("stale", "dead"))
        await engines.until(lambda: not fleet._upkeep._tasks)

    await kill(0)
    assert engines.states[0] == "stale"
    engines.now = 3599.0
    await kill(1)
    assert engines.states == ["ready", "dead"] and engines.servers[1].starts == 1
    fleet.restart_dead()
    assert engines.states[1] == "dead"
    engines.now = 3600.0
    fleet.restart_dead()
    await engines.until(lambda: engines.states[1] == "stale")
    assert engines.servers[1].starts == 2


async def test_one_failed_start_restarts_that_one():
    engines = Engines(num=3)
    engines.servers[1].bad_starts = 1
    await engines.fleet.start()
    await engines.fleet.wait_ready()
    await engines.until(lambda: engines.states == ["stale"] * 3)
    assert [server.starts for server in engines.servers] == [1, 2, 1]
    assert any("engine_1 did not start" in line and "no such model" in line for line in engines.messages)


async def test_starts_that_always_fail_end_the_run_with_their_cause():
    engines = Engines(num=1)
    engines.servers[0].bad_starts = 100
    await engines.fleet.start()
    with pytest.raises(EngineFailure, match=r"(?s)0 of 1 engines.*did not start.*OSError: no such model"):
        await engines.fleet.wait_ready()
    assert engines.servers[0].starts == 3 and not engines.servers[0].is_running


async def test_a_model_that_no_engine_can_run_ends_the_run_before_its_first_step_with_the_cause():
    """The server only said "see stack trace (above)"; the cause is in its log."""
    engines = Engines(num=1, rollout={"max_restarts": 1})
    engines.servers[0].cannot_run = True
    await engines.fleet.start()
    with pytest.raises(EngineFailure, match="root cause in the log of engine_0"):
        await engines.fleet.wait_ready()
    assert engines.servers[0].starts == 2 and not engines.servers[0].is_running


async def test_ready_means_that_every_first_start_has_ended():
    engines = Engines(num=2)
    engines.servers[1].is_slow = True
    await engines.fleet.start()
    ready = asyncio.ensure_future(engines.fleet.wait_ready())
    await engines.until(lambda: engines.states == ["stale", "starting"])
    assert not ready.done()
    engines.servers[1].is_slow = False
    await asyncio.wait_for(ready, 2)


async def test_a_bug_in_a_restart_keeps_its_traceback():
    engines = Engines(num=1)
    fleet = await engines.started()
    engines.servers[0].log_tail = lambda: 1 / 0  # type: ignore[method-assign]
    engines.client(0).failures = {0: [EngineDied("gone")]}
    with pytest.raises(ZeroDivisionError):
        await generate(fleet, 0)


async def test_close_stops_everything_whatever_state_it_is_in():
    engines = Engines(num=3)
    fleet = await engines.started()
    engines.servers[0].is_slow = True
    engines.servers[1].is_slow_at_first_request = True
    for name in ("engine_0", "engine_1"):
        fleet.set_failed(name, "a test", EngineDied("gone"))
    await engines.until(lambda: engines.servers[0].starts == 2 and len(engines.clients["engine_1"]) == 2)
    await fleet.close()
    assert not any(server.is_running for server in engines.servers)
    assert all(client.is_closed for clients in engines.clients.values() for client in clients)
    assert not fleet._upkeep._tasks


# --- around a push


async def test_pause_leaves_nothing_in_flight_on_any_replica():
    """Also what was cancelled here and still runs on its server."""
    engines = Engines(num=2)
    fleet = await engines.started()
    engines.client(0).held = {0}
    engines.client(1).held = {1}
    cancelled = asyncio.ensure_future(generate(fleet, 0))
    going_on = asyncio.ensure_future(generate(fleet, 1))
    await engines.until(lambda: engines.client(0).running == engines.client(1).running == 1)
    cancelled.cancel()
    pausing = asyncio.ensure_future(fleet.pause())
    await asyncio.sleep(0)
    assert engines.states == ["draining", "draining"]
    await asyncio.sleep(0.05)  # longer than an idle server may take to say so
    engines.client(1).held = set()
    late = asyncio.ensure_future(generate(fleet, 2))
    await asyncio.wait_for(pausing, 2)
    assert going_on.done() and not late.done()
    assert engines.client(0).running == engines.client(1).running == 0
    for client in (engines.client(0), engines.client(1)):
        await client.reset_prefix_cache()
    await fleet.resume()
    assert engines.states == ["ready", "ready"]
    await asyncio.wait_for(late, 2)


async def test_a_server_that_does_not_get_idle_is_restarted():
    engines = Engines(num=2)
    fleet = await engines.started()

    async def busy() -> None:
        raise RequestFailed("requests are running", "busy")

    engines.client(0).wait_idle = busy
    await fleet.pause()
    assert engines.states == ["dead", "draining"]
    await fleet.resume()
    await engines.until(lambda: engines.states == ["stale", "ready"])


async def test_push_targets_are_those_that_answer():
    engines = Engines(num=3)
    fleet = await engines.started()
    engines.client(1).is_healthy = False
    assert await fleet.push_targets() == ["engine_0", "engine_2"]
    await engines.until(lambda: engines.states == ["ready", "stale", "ready"])
    assert await fleet.push_targets() == ["engine_0", "engine_1", "engine_2"]


async def test_a_call_gives_the_error_of_each_and_raises_none():
    engines = Engines(num=3)
    fleet = await engines.started()
    fleet.set_failed("engine_2", "begin", TimeoutError("late"))

    async def what(name: str, client: FakeClient) -> None:
        if client is engines.client(1):
            raise TimeoutError("too late")

    errors = await fleet.call(["engine_0", "engine_1", "engine_2"], what)
    assert errors["engine_0"] is None
    assert isinstance(errors["engine_1"], TimeoutError)
    assert isinstance(errors["engine_2"], EngineDied) and "begin" in str(errors["engine_2"])


async def test_a_replica_without_the_new_weights_takes_no_request():
    engines = Engines(num=2)
    fleet = await engines.started(version=0)
    await fleet.pause()
    fleet.set_ready("engine_1", 1)
    await fleet.resume()
    assert engines.states == ["stale", "ready"]
    await generate_all(fleet, 3)
    assert engines.client(0).started == [] and engines.client(1).seeds == {i: 1000 + i for i in range(3)}
    fleet.expect(2)
    assert engines.states == ["stale", "stale"]
