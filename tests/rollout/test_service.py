"""Rollouts from the main thread's view: steps, evaluations, pushes, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest
from support.engines import Engines
from support.service import GREEDY, Service, positions, prompts, wait_until

from megatron_dapo.rollout.client import EngineDied
from megatron_dapo.rollout.service import StopRequested, WeightsNeeded
from megatron_dapo.types import Prompt


def test_steps_come_one_after_another_sampled_by_the_pushed_version(services):
    service = services(Engines(num=2))
    first = service.next_step(0)
    assert positions(first.groups) == [0, 1, 2] and {group.weight_version for group in first.groups} == {0}
    assert service.push(1) == ["engine_0", "engine_1"]
    second = service.next_step(1)
    assert positions(second.groups) == [3, 4, 5] and {group.weight_version for group in second.groups} == {1}
    assert service.replica_states() == {"engine_0": "ready", "engine_1": "ready"}


def test_an_evaluation_gives_groups_in_the_order_of_the_prompts(services):
    engines = Engines(num=2, prepare=lambda client: setattr(client, "delay", lambda prompt: 7 - prompt))
    service = services(engines)
    groups = service.submit(prompts(7), GREEDY)
    assert positions(groups) == list(range(7))
    assert {len(group.completions) for group in groups} == {1}


def test_an_evaluation_is_sampled_as_configured_when_nothing_is_said(services):
    service = services(Engines())
    assert {len(group.completions) for group in service.submit(prompts(2))} == {1}


def test_seeds_of_training_and_of_evaluation_differ_at_equal_position_and_version(services):
    engines = Engines()
    service = services(engines)
    service.next_step(0)
    client = engines.client(0)
    training = dict(client.seeds)
    service.submit(prompts(3), GREEDY)
    assert training == {position: position << 12 for position in range(3)}
    assert client.seeds == {position: (1 << 60) + 2048 + (position << 12) for position in range(3)}


def test_a_step_needs_the_version_that_it_asks_for(services):
    service = services(Engines())
    with pytest.raises(WeightsNeeded):
        service.next_step(1)
    service.push(1)
    assert {group.weight_version for group in service.next_step(1).groups} == {1}


# --- requests that outlive their step (sampling.max_age >= 1)


def aged_service(services, held: set[int]) -> tuple[Service, Engines]:
    """After step 0 on prompts 0, 1, 2; 3, 4 and 5 were sent too."""
    engines = Engines(prepare=lambda client: setattr(client, "held", held))
    service = services(engines, max_age=1)
    service.collector.one_round_at_a_time, service.collector.run_ahead = False, 3
    assert positions(service.next_step(0).groups) == [0, 1, 2]
    return service, engines


def test_a_push_waits_for_requests_that_the_step_left_running(services):
    held = {4}
    service, engines = aged_service(services, held)
    timer = threading.Timer(0.1, held.clear)
    timer.start()
    service.push(1)
    timer.join()
    assert 4 in engines.client(0).finished and engines.client(0).started.count(4) == 1
    second = service.next_step(1)
    assert positions(second.groups) == [3, 4, 5]
    assert {group.weight_version for group in second.groups} == {0}


def test_after_a_signal_nobody_waits_for_them_and_a_checkpoint_favours_none(services):
    service, engines = aged_service(services, {4})
    wait_until(lambda: {3, 5} <= set(engines.client(0).finished))
    service.interrupt()
    service.push(1)  # the update that ran when the signal came
    assert engines.client(0).running == 0
    state = service.state()
    assert state["carried"] == [] and positions_of(state["waiting"]) == [3, 4, 5]


# --- signals


def test_a_signal_gives_the_step_up_as_if_it_had_not_begun(services):
    engines = Engines(num=1, prepare=lambda client: setattr(client, "held", {1}))
    service = services(engines)
    before = service.state()
    old = signal.signal(signal.SIGUSR1, lambda number, frame: service.interrupt())
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(StopRequested):
            service.next_step(0)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, old)
    state = service.state()
    assert positions_of(state["waiting"]) == [0, 1, 2] and state["carried"] == before["carried"]
    with pytest.raises(StopRequested):
        service.next_step(0)
    with pytest.raises(StopRequested):
        service.submit(prompts(1), GREEDY)
    service.pause()  # a push is not interrupted, and finds nothing in flight
    assert engines.client(0).running == 0


def positions_of(waiting: list[Prompt]) -> list[int]:
    return [prompt.position for prompt in waiting]


def test_a_signal_between_two_calls_ends_the_task_that_waits_for_weights(services):
    engines = Engines(num=1)
    service = services(engines)
    engines.client(0).failures = {1: [EngineDied("gone")]}
    with pytest.raises(WeightsNeeded):
        service.next_step(0)
    service.interrupt()
    with pytest.raises(StopRequested):
        service.next_step(0)
    assert positions_of(service.state()["waiting"]) == [0, 1, 2]


async def test_a_step_that_takes_its_time_to_stop_is_waited_for(tmp_path):
    """Also when it waited for weights: state() must not be asked of a collector that still gives the
    step up.
    """
    service = Service(Engines(), tmp_path)
    given_up = False

    async def step() -> None:
        nonlocal given_up
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            given_up = True

    service.fleet.router.weights_needed.set()
    with pytest.raises(WeightsNeeded):
        await service._result("step", step)
    service.interrupt()
    service._cancel_task()
    with pytest.raises(StopRequested):
        await service._result("step", step)
    assert given_up
    service.close()


def test_a_signal_while_the_engines_start(tmp_path):
    engines = Engines(num=1)
    engines.servers[0].is_slow = True
    service = Service(engines, tmp_path)
    service.start()
    timer = threading.Timer(0.05, service.interrupt)
    timer.start()
    with pytest.raises(StopRequested):
        service.wait_ready()
    timer.join()
    service.close()
    service.close()
    assert not engines.servers[0].is_running


def test_a_service_that_was_never_started_can_be_closed(tmp_path):
    service = Service(Engines(), tmp_path)
    service.interrupt()
    service.close()
    with pytest.raises(RuntimeError, match="not started"):
        service.next_step(0)


def test_the_loop_goes_on_while_the_main_thread_works(services):
    """What the service is for: engines restart, and later generate, during an update."""
    engines = Engines(num=2)
    service = services(engines)
    service.set_failed("engine_0", "commit", EngineDied("gone"))
    wait_until(lambda: service.engines.states[0] == "stale")  # this thread calls nothing meanwhile


async def test_all_cancels_the_others_before_it_raises():
    from megatron_dapo.rollout.service import _all

    ended = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def fails() -> None:
        await asyncio.sleep(0)
        raise LookupError

    with pytest.raises(LookupError):
        await _all([endless(), fails(), endless()])
    assert ended == [True, True]
