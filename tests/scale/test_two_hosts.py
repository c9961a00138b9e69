"""Whole runs over two hosts, a rank and an engine on each, against one host with two of both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.hosts import CARD, Host, Hosts, reason_against
from support.models import make_tiny_model
from support.runs import Run, assert_steps_equal, environment, metrics, overrides, write_data

STEPS = 3
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(reason_against() is not None, reason=reason_against() or ""),
    pytest.mark.timeout(900),
]
# Sums depend on the number of threads, which depends on the cores: two for all processes of a run together.
CORES = """
import os, runpy
if __name__ == "__main__":
    cores = [int(core) for core in os.environ["DAPO_TEST_CORES"].split(",")]
    os.sched_setaffinity(0, cores)
    os.cpu_count = lambda: len(cores)
    runpy.run_module("megatron_dapo.train", run_name="__main__", alter_sys=True)
"""


class RunOnHosts(Run):
    """A run of two ranks, spread over the hosts; `process` is the first host's torchrun."""

    def __init__(
        self, hosts: Sequence[Host], arguments: list[str], data: Path, log: Path, **extra: str
    ) -> None:
        self.log, self.mark = log, f"{log}-{time.time_ns()}"
        self.launchers: list[subprocess.Popen[Any]] = []
        cores = ["0,1"] if len(hosts) == 1 else ["0", "1"]
        for number, host in enumerate(hosts):
            command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}"]
            command += [f"--nproc-per-node={2 // len(hosts)}", f"--node-rank={number}"]
            command += [f"--master-addr={hosts[0].address}", "-m", "dapo_test_cores", *arguments]
            own = {"DAPO_TEST_CORES": cores[number], "GLOO_SOCKET_IFNAME": CARD, "OMP_NUM_THREADS": "1"}
            with log.open("ab") as file:
                process = host.popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment(data, self.mark, **own, **extra),
                )
            self.launchers.append(process)
        self.process = self.launchers[0]

    def wait(self, timeout_s: float = 600) -> int:
        return max(abs(process.wait(timeout_s)) for process in self.launchers)

    def kill(self) -> None:
        super().kill()
        for process in self.launchers:
            process.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("two_hosts")
    model = make_tiny_model(folder / "model", tied=True, max_positions=1024)
    data = write_data(folder / "data")
    data.with_name("dapo_test_cores.py").write_text(CORES)
    return SimpleNamespace(folder=folder, model=model, data=data)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(2) as two:
        yield two


def start(hosts: Sequence[Host], place: SimpleNamespace, name: str, **extra: str) -> RunOnHosts:
    engines = 2 // len(hosts)
    values = {"run__max_steps": STEPS, "rollout__engines": engines, "checkpoint__export_hf": False}
    arguments = overrides(place.model, place.data, place.folder / name, **values)
    return RunOnHosts(hosts, arguments, place.data, place.folder / f"{name}.log", **extra)


@pytest.fixture(scope="module")
def finished(hosts, place) -> SimpleNamespace:
    """The run on one host."""
    run = start([hosts[0]], place, "one_host")
    try:
        assert run.wait() == 0, run.text
        assert run.all_gone()
    finally:
        run.kill()
    run_dir = place.folder / "one_host"
    return SimpleNamespace(run_dir=run_dir, metrics=metrics(run_dir))


def test_two_hosts_train_as_one(hosts, place, finished):
    run_dir = place.folder / "two_hosts"
    run = start([hosts[0], hosts[1]], place, "two_hosts")
    try:
        run.until(lambda: metrics(run_dir))
        engines = run.named("vllm.entrypoints")
        commands = [engine.cmdline() for engine in engines]
        [token] = {engine.environ()["MEGATRON_DAPO_TOKEN"] for engine in engines}
        assert run.wait() == 0, run.text
        assert run.all_gone()
    finally:
        run.kill()
    addresses = sorted(words[words.index("--host") + 1] for words in commands)
    assert addresses == [hosts[1].address, "127.0.0.1"]
    assert_steps_equal(run_dir, finished, range(1, STEPS + 1))
    logs = [path.read_text() for path in (run_dir / "logs").iterdir()]
    assert len(logs) == 2
    assert not any(token in text for text in [*logs, *sum(commands, []), run.text])


def test_an_engine_of_the_other_host_is_killed(hosts, place, finished):
    run_dir = place.folder / "killed"
    run = start([hosts[0], hosts[1]], place, "killed", DAPO_TEST_HOLD=f"{run_dir} 1")
    try:
        run.until((run_dir / "held").exists)
        [engine] = run.named(f"--host {hosts[1].address}")
        os.kill(engine.pid, signal.SIGKILL)
        (run_dir / "release").touch()
        assert run.wait() == 0, run.text
        assert run.all_gone()
    finally:
        run.kill()
    assert "engine_1 failed while" in run.text and "engine_1 is started again" in run.text
    assert "Traceback" not in run.text
    assert_steps_equal(run_dir, finished, range(1, STEPS + 1))
