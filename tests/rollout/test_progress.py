"""Progress is read from vLLM's counters."""

from __future__ import annotations

from support.http_server import metrics

from megatron_dapo.rollout.progress import ProgressClock, ServerLoad, parse_load


def test_the_load_is_read_from_the_counters_and_nothing_else():
    """10 prompt tokens and 7 generated; 3 running, 1 waiting. Histograms and reasons do not count."""
    assert parse_load(metrics(tokens=7, running=3)) == ServerLoad(tokens=17, sequences=4)


def test_engines_of_one_server_are_added_up():
    text = "\n".join(f'vllm:generation_tokens_total{{engine="{i}"}} {10.0 * i}' for i in range(4))
    assert parse_load(text) == ServerLoad(tokens=60, sequences=0)


def test_large_counters_are_read_whole():
    assert parse_load('vllm:generation_tokens_total{engine="0"} 1.23456789e+08').tokens == 123456789


def test_a_server_without_the_counter_has_no_load():
    assert parse_load("") is None
    assert parse_load('vllm:num_requests_running{engine="0"} 3.0') is None


def test_time_without_progress():
    clock = ProgressClock(now=100.0)
    assert clock.without_progress(105.0) == 5.0
    clock.observe(7, now=106.0)  # the first count is progress: it was never seen before
    assert clock.without_progress(110.0) == 4.0
    clock.observe(7, now=120.0)
    clock.observe(None, now=125.0)  # no answer
    assert clock.without_progress(126.0) == 20.0
    clock.observe(8, now=127.0)
    assert clock.without_progress(127.5) == 0.5
    clock.answered(now=130.0)
    assert clock.without_progress(131.0) == 1.0
