"""Rollouts from the main thread's view: steps, evaluations, pushes, signals."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from support.collecting import carried, waiting
from support.engines import Engines
from support.service import GREEDY, Service, positions, prompts, wait_until

from megatron_dapo.rollout.errors import EngineDied
from megatron_dapo.rollout.rollouts import StopRequested, WeightsNeeded


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
    assert waiting(state) == [0, 1, 2] and carried(state) == carried(before) == []
    with pytest.raises(StopRequested):
        service.next_step(0)
    with pytest.raises(StopRequested):
        service.submit(prompts(1), GREEDY)
    service.pause()  # a push is not interrupted, and finds nothing in flight
    assert engines.client(0).running == 0


def test_a_signal_between_two_calls_ends_the_task_that_waits_for_weights(services):
    engines = Engines(num=1)
    service = services(engines)
    engines.client(0).failures = {1: [EngineDied("gone")]}
    with pytest.raises(WeightsNeeded):
        service.next_step(0)
    service.interrupt()
    with pytest.raises(StopRequested):
        service.next_step(0)
    assert waiting(service.state()) == [0, 1, 2]


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
    service.push_targets()
    service.set_failed("engine_0", "commit", EngineDied("gone"))
    wait_until(lambda: service.engines.states[0] == "stale")  # this thread calls nothing meanwhile


def test_it_is_told_four_times_a_second_how_the_engines_are(tmp_path):
    seen = []
    engines = Engines(num=2)
    engines.servers[1].is_slow = True
    service = Service(engines, tmp_path, watch=lambda *how: seen.append(how))
    service.start()
    wait_until(lambda: bool(seen))
    service.close()
    assert seen[0] == ({"engine_0": "starting", "engine_1": "starting"}, {"engine_0": 0, "engine_1": 0}, 0)
