"""Whole runs over two hosts, a rank and an engine on each, against one host with two of both."""

from __future__ import annotations

import os
import signal

import pytest
from support.host_runs import NUM_STEPS, start
from support.hosts import reason_against
from support.runs import assert_steps_equal, metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(reason_against() is not None, reason=reason_against() or ""),
    pytest.mark.timeout(900),
]


def test_two_hosts_train_as_one(two_hosts, place, finished):
    run_dir = place.folder / "two_hosts"
    with start(place, [two_hosts[0], two_hosts[1]], "two_hosts", ranks=1) as run:
        run.until(lambda: metrics(run_dir))
        engines = run.named("vllm.entrypoints")
        commands = [engine.cmdline() for engine in engines]
        [token] = {engine.environ()["MEGATRON_DAPO_TOKEN"] for engine in engines}
        assert run.wait() == 0, run.text
        assert run.all_gone()
    addresses = sorted(words[words.index("--host") + 1] for words in commands)
    assert addresses == [two_hosts[1].address, "127.0.0.1"]
    assert_steps_equal(run_dir, finished, range(1, NUM_STEPS + 1))
    logs = [path.read_text() for path in (run_dir / "logs").iterdir()]
    assert len(logs) == 2
    assert not any(token in text for text in [*logs, *sum(commands, []), run.text])


def test_an_engine_of_the_other_host_is_killed(two_hosts, place, finished):
    run_dir = place.folder / "killed"
    hold = {"DAPO_TEST_HOLD": f"{run_dir} 1"}
    with start(place, [two_hosts[0], two_hosts[1]], "killed", ranks=1, extra=hold) as run:
        run.until((run_dir / "held").exists)
        [engine] = run.named(f"--host {two_hosts[1].address}")
        os.kill(engine.pid, signal.SIGKILL)
        (run_dir / "release").touch()
        assert run.wait() == 0, run.text
        assert run.all_gone()
    assert "engine_1 failed while" in run.text and "engine_1 is started again" in run.text
    assert "Traceback" not in run.text
    assert_steps_equal(run_dir, finished, range(1, NUM_STEPS + 1))
