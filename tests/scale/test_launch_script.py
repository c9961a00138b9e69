"""The flagship's script itself, with a tiny configuration, over two hosts as a person starts it on each."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.host_runs import NUM_STEPS, RunOnHosts
from support.hosts import Host, reason_against
from support.launching import SCRIPT
from support.runs import assert_steps_equal, environment, overrides

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(reason_against() is not None, reason=reason_against() or ""),
    pytest.mark.timeout(1200),
]
# Sums depend on the number of threads, which depends on the cores: one for each rank, as on one host.
CORES = """
import os, sys
if "megatron_dapo.train" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv:
    os.sched_setaffinity(0, [int(os.environ["DAPO_TEST_CORES"])])
    os.cpu_count = lambda: 1
"""


class ScriptOnHosts(RunOnHosts):
    """The script on each host, as its head says for a plain start; `process` is the first host's."""

    def __init__(self, hosts: Sequence[Host], arguments: Sequence[str], data: Path, log: Path, **extra: str):
        self.log, self.mark = log, f"{log}-{time.time_ns()}"
        self.launchers = []
        for number, host in enumerate(hosts):
            own = {"NNODES": f"{len(hosts)}", "NODE_RANK": f"{number}", "MASTER_ADDR": hosts[0].name}
            own |= {"GPUS_PER_NODE": "1", "DAPO_TEST_CORES": f"{number % 2}", "PYTHON": sys.executable}
            with log.open("ab") as file:
                process = host.popen(
                    ["bash", str(SCRIPT), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment(data, self.mark, **own, **extra),
                )
            self.launchers.append(process)
        self.process = self.launchers[0]


def test_the_script_trains_over_two_hosts_as_on_one(two_hosts, place, finished):
    """It finds the interface, checks on the first host, starts a rank and an engine on each."""
    folder = place.folder / "script"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CORES)
    config = folder / "tiny_run.yaml"
    config.write_text("checkpoint: {export_hf: false, every_steps: 1}\n")
    settings = {"run__max_steps": NUM_STEPS, "rollout__engines": 1, "checkpoint__keep": NUM_STEPS}
    arguments = overrides(place.model, place.data, folder / "run", **settings)
    paths = f"{folder}:{place.data.parent}"
    extra = {"CONFIG": str(config), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    hosts = [two_hosts[0], two_hosts[1]]
    with ScriptOnHosts(hosts, arguments, place.data, folder / "log", **extra) as run:
        assert run.wait(900) == 0, run.text
        assert run.all_gone()
    assert len(list((folder / "run" / "logs").iterdir())) == 2
    assert_steps_equal(folder / "run", finished, range(1, NUM_STEPS + 1))
