"""Idle time by cause, integrated by hand over samples of the fleet."""

from __future__ import annotations

import math

import pytest

from megatron_dapo.report.engines import EngineLog, fleet_line

READY = {"a": "ready", "b": "ready"}


def test_idle_time_goes_to_the_phase_that_it_falls_into():
    log = EngineLog()
    log.add(0.0, {"a": "ready", "b": "starting"}, {"a": 8}, 40)
    log.add(4.0, READY, {"a": 8, "b": 8}, 7)
    log.add(8.0, READY, {"a": 2, "b": 0}, 0)
    log.add(11.0, READY, {}, 0)
    phases = [("checkpoint", 0.0, 1.0), ("rollout", 1.0, 10.0), ("update", 10.0, 12.0), ("sync", 12.5, 14.5)]
    # 14 s x 2 engines. Idle: b for 2 s of rollout; in update b for 1 s, then both for 1 s; in sync both.
    assert log.metrics(phases) == pytest.approx(
        {
            "engines/idle_tail": 2 / 28,
            "engines/idle_trainer": 3 / 28,
            "engines/idle_sync": 4 / 28,
            "engines/down": 4 / 28,
            "engines/waiting_max": 40,
        }
    )


def test_equal_samples_are_kept_once_and_count_for_their_whole_time():
    log = EngineLog()
    for tenth in range(100):
        log.add(tenth / 10, READY, {"a": 1 + tenth}, 0)
    assert len(log._samples) == 1 and log.counters() == []
    assert log.metrics([("rollout", 0.0, 20.0)])["engines/idle_tail"] == 0.5


def test_engines_that_drain_are_up_and_stale_ones_are_down():
    log = EngineLog()
    log.add(0.0, {"a": "draining", "b": "stale", "c": "dead", "d": "ready"}, {"a": 1}, 0)
    measured = log.metrics([("sync", 1.0, 2.0)])
    assert (measured["engines/down"], measured["engines/idle_sync"]) == (0.5, 0.25)


def test_what_no_sample_tells_is_not_a_number():
    assert all(math.isnan(value) for value in EngineLog().metrics([("rollout", 0.0, 1.0)]).values())
    log = EngineLog()
    log.add(5.0, READY, {}, 3)
    assert math.isnan(log.metrics([("rollout", 0.0, 1.0)])["engines/idle_tail"])


def test_the_sample_that_holds_when_a_step_ends_is_kept_for_the_next():
    log = EngineLog(keep_counters=True)
    for when, waiting in ((0.0, 9), (1.0, 5), (3.0, 2)):
        log.add(when, READY, {"a": 1}, waiting)
    log.forget(2.0)
    assert [counters.when for counters in log.counters()] == [3.0]
    measured = log.metrics([("rollout", 2.0, 4.0)])
    assert (measured["engines/idle_tail"], measured["engines/waiting_max"]) == (0.5, 5)


def test_the_line_of_the_fleet():
    states = {f"engine_{i}": "ready" for i in range(31)} | {"engine_31": "starting"}
    assert fleet_line(states, {"engine_0": 4000, "engine_1": 812}, 103) == (
        "engines 31 ready, 1 starting | 4,812 running, 103 waiting"
    )
    assert fleet_line({}, {}, 0) == "engines none | 0 running, 0 waiting"
