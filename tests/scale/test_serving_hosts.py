"""Whole runs whose engines are on hosts without ranks (python -m megatron_dapo.serve)."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from support.host_runs import NUM_STEPS, RunOnHosts, finished, start
from support.hosts import Host, Hosts, reason_against
from support.runs import assert_steps_equal, environment, metrics, overrides

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(reason_against() is not None, reason=reason_against() or ""),
    pytest.mark.timeout(900),
]
APART = {"layout__data_parallel": 1, "rollout__colocated": False}


@pytest.fixture(scope="module")
def three_hosts() -> Iterator[Hosts]:
    with Hosts(3) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def colocated(place, three_hosts) -> SimpleNamespace:
    """One rank and one engine on one host."""
    return finished(place, three_hosts[0], "colocated", ranks=1, engines=1, layout__data_parallel=1)


@contextmanager
def serving(run: RunOnHosts, place: SimpleNamespace, host: Host, name: str) -> Iterator[Any]:
    """serve.py on a host, as the run's console says; its output goes to that of the run."""
    address = run.until(lambda: re.search(r"on each of their hosts run: .* --join (\S+)", run.text)).group(1)
    values = {"rollout__engines": 1, "checkpoint__export_hf": False}
    arguments = overrides(place.model, place.data, place.folder / name, **APART, **values)
    command = [sys.executable, "-m", "megatron_dapo.serve", *arguments, "--join", address]
    with run.log.open("ab") as file:
        process = host.popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(place.data, run.mark, OMP_NUM_THREADS="1"),
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def engines_on(run: RunOnHosts, host: Host) -> list[Any]:
    return run.named(f"--host {host.address}")


@pytest.mark.parametrize("delta", [False, True])
def test_an_engine_on_another_host_trains_as_one_beside_the_rank(place, three_hosts, colocated, delta):
    name, first, second = f"apart{'_by_deltas' * delta}", three_hosts[0], three_hosts[1]
    run_dir = place.folder / name
    with (
        start(place, [first], name, ranks=1, sync__delta=delta, **APART) as run,
        serving(run, place, second, name) as server,
    ):
        run.until(lambda: metrics(run_dir))
        assert len(engines_on(run, second)) == 1 and len(run.named("vllm.entrypoints")) == 1
        assert run.wait() == 0, run.text
        assert server.wait(60) == 0, run.text
        assert run.all_gone()
    assert "serve 0 on host1 has joined with engine_0" in run.text and "the run has ended" in run.text
    assert "Traceback" not in run.text
    assert_steps_equal(run_dir, colocated, range(1, NUM_STEPS + 1))


def test_hosts_come_and_go_while_the_run_goes_on(place, three_hosts, colocated):
    """After the first step a second host joins and the first one leaves."""
    name, first, second, third = "come_and_go", three_hosts[0], three_hosts[1], three_hosts[2]
    run_dir = place.folder / name
    hold = {"DAPO_TEST_HOLD": f"{run_dir} 1"}
    with (
        start(place, [first], name, ranks=1, extra=hold, **APART) as run,
        serving(run, place, second, name) as leaver,
    ):
        run.until((run_dir / "held").exists)
        [server] = [p for p in run.named("megatron_dapo.serve") if p.cmdline()[0] == sys.executable]
        with serving(run, place, third, name) as joiner:
            run.until(lambda: "serve 1 on host2 has joined with engine_1" in run.text)
            server.send_signal(signal.SIGTERM)  # `leaver` itself would not pass it on
            assert leaver.wait(120) == 0, run.text
            (run_dir / "release").touch()
            assert run.wait() == 0, run.text
            assert joiner.wait(60) == 0, run.text
            assert run.all_gone()
    assert "serve 0 on host1 leaves once the requests of engine_0 have ended" in run.text
    assert run.text.count("serve 0 on host1 has left") == 2  # say rank 0 and the host
    assert not any(words in run.text for words in ("failed", "is started again", "Traceback")), run.text
    assert_steps_equal(run_dir, colocated, range(1, NUM_STEPS + 1))
