"""Whole runs over network namespaces as hosts: torchrun on each of them, all ranks together one run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.hosts import CARD, Host
from support.models import make_tiny_model
from support.runs import Run, environment, metrics, overrides, write_data

NUM_STEPS = 3
# Sums depend on the number of threads, which depends on the cores: one for each rank and engine, whatever the
# number of hosts. One host alone has both cores of a small machine, several have one each.
CORES = """
import os, runpy
if __name__ == "__main__":
    cores = [int(core) for core in os.environ["DAPO_TEST_CORES"].split(",")]
    os.sched_setaffinity(0, cores)
    os.cpu_count = lambda: len(cores)
    runpy.run_module("megatron_dapo.train", run_name="__main__", alter_sys=True)
"""


class RunOnHosts(Run):
    """A run with `ranks` ranks on each of the hosts; `process` is the first host's torchrun."""

    def __init__(
        self,
        hosts: Sequence[Host],
        ranks: int,
        arguments: Sequence[str],
        data: Path,
        log: Path,
        **extra: str,
    ) -> None:
        self.log, self.mark = log, f"{log}-{time.time_ns()}"
        self.launchers: list[subprocess.Popen[Any]] = []
        for number, host in enumerate(hosts):
            command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}"]
            command += [f"--nproc-per-node={ranks}", f"--node-rank={number}"]
            command += [f"--master-addr={hosts[0].address}", "-m", "dapo_test_cores", *arguments]
            cores = "0,1" if len(hosts) == 1 else str(number % 2)
            own = {"DAPO_TEST_CORES": cores, "GLOO_SOCKET_IFNAME": CARD, "OMP_NUM_THREADS": "1"}
            with log.open("ab") as file:
                process = host.popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment(data, self.mark, **(own | extra)),
                )
            self.launchers.append(process)
        self.process = self.launchers[0]

    def __enter__(self) -> RunOnHosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, timeout_s: float = 600) -> int:
        """The worst exit status of all launchers; they have `timeout_s` together."""
        deadline = time.monotonic() + timeout_s
        return max(abs(p.wait(max(0.1, deadline - time.monotonic()))) for p in self.launchers)

    def kill(self) -> None:
        super().kill()
        for process in self.launchers:
            process.wait()


def make_place(folder: Path) -> SimpleNamespace:
    """A tiny model and data for runs over hosts, in `folder`."""
    model = make_tiny_model(folder / "model", tied=True, max_positions=1024)
    data = write_data(folder / "data")
    data.with_name("dapo_test_cores.py").write_text(CORES)
    return SimpleNamespace(folder=folder, model=model, data=data)


def start(
    place: SimpleNamespace,
    hosts: Sequence[Host],
    name: str,
    *,
    ranks: int,
    engines: int = 1,
    extra: dict[str, str] | None = None,
    log: str = "",
    **values: Any,
) -> RunOnHosts:
    """A run called `name` with as many ranks and engines on each host; it keeps every checkpoint."""
    defaults = {
        "run__max_steps": NUM_STEPS,
        "rollout__engines": engines,
        "checkpoint__export_hf": False,
        "checkpoint__every_steps": 1,
        "checkpoint__keep": NUM_STEPS,
    }
    arguments = overrides(place.model, place.data, place.folder / name, **(defaults | values))
    log_path = place.folder / f"{log or name}.log"
    return RunOnHosts(hosts, ranks, arguments, place.data, log_path, **(extra or {}))


def finished(
    place: SimpleNamespace, host: Host, name: str, *, ranks: int, engines: int, **values: Any
) -> SimpleNamespace:
    """A run on one host that nothing disturbs, for the others to be compared with."""
    with start(place, [host], name, ranks=ranks, engines=engines, **values) as run:
        assert run.wait() == 0, run.text
        assert run.all_gone()
    run_dir = place.folder / name
    return SimpleNamespace(run_dir=run_dir, metrics=metrics(run_dir))
