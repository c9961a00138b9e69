"""tools/doctor.py: what it says of faults, what it hides, and two hosts under torchrun."""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from support.hosts import CARD, Hosts, reason_against

TOOLS = Path(__file__).parents[2] / "tools"
DOCTOR = TOOLS / "doctor.py"


@pytest.fixture
def checkups(monkeypatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(TOOLS))
    names = ("findings", "links", "machine", "network", "ranks", "software", "storage")
    return SimpleNamespace(**{name: importlib.import_module(f"checkups.{name}") for name in names})


# --- the report


def test_what_hosts_have_in_common_is_said_once(checkups):
    Finding = checkups.findings.Finding
    same = Finding(section="software", name="torch", text="2.13")
    slow = Finding(section="run.dir", name="speed", text="0.01 GB/s", remedy="another disk")
    gone = Finding(
        section="links", name="gloo", text="rank 1 is lost\nrank 2 too", remedy="look", failed=True
    )
    by_host = {"a": [same], "b": [same, slow], "": [gone]}
    assert checkups.findings.as_text(by_host).splitlines() == [
        "software",
        "  ok       torch                    2.13",
        "run.dir",
        "  warning  speed                    [b] 0.01 GB/s",
        "           -> another disk",
        "links",
        "  failed   gloo                     rank 1 is lost",
        "                                    rank 2 too",
        "           -> look",
        "1 failed, 1 warnings",
    ]
    found = checkups.findings.as_json(by_host)
    assert found["healthy"] is False and found["hosts"] == ["a", "b"]
    assert [(line["host"], line["verdict"]) for line in found["findings"]] == [
        ("a", "ok"),
        ("b", "ok"),
        ("b", "warning"),
        ("", "failed"),
    ]


def test_secrets_are_hidden_wherever_they_stand(checkups):
    environment = {
        "HF_TOKEN": "hf_abcdef",
        "WANDB_API_KEY": "k3y-of-wandb",
        "NCCL_SECRET": "no",
        "https_proxy": "http://me:pass@proxy:1",
        "NCCL_DEBUG_FILE": "/tmp/hf_abcdef.log",
        "UNRELATED": "1",
    }
    lines = checkups.network.environment_variables(environment)
    found = checkups.findings.without_secrets(lines, environment)
    assert {line.name: line.text for line in found} == {
        "HF_TOKEN": "(redacted)",
        "WANDB_API_KEY": "(redacted)",
        "NCCL_SECRET": "(redacted)",
        "https_proxy": "http://(redacted)@proxy:1",
        "NCCL_DEBUG_FILE": "/tmp/(redacted).log",
    }
    note = replace(lines[0], text="no k3y-of-wandb", remedy="remove hf_abcdef")
    [note] = checkups.findings.without_secrets([note], environment)
    assert (note.text, note.remedy) == ("no (redacted)", "remove (redacted)")


# --- one host


@pytest.mark.parametrize(
    ("files", "memory", "cores"),
    [
        ({"memory.max": "1073741824\n", "cpu.max": "150000 100000\n"}, 2**30, 1.5),
        ({"memory.max": "max\n", "cpu.max": "max 100000\n"}, None, None),
        (
            {
                "memory/memory.limit_in_bytes": "4096\n",
                "cpu/cpu.cfs_quota_us": "50000\n",
                "cpu/cpu.cfs_period_us": "100000\n",
            },
            4096,
            0.5,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1\n"}, None, None),
        ({}, None, None),
    ],
)
def test_limits_of_a_control_group(checkups, tmp_path, files, memory, cores):
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert checkups.machine.cgroup_memory(tmp_path) == memory
    assert checkups.machine.cgroup_cores(tmp_path) == cores
    names = {f.name for f in checkups.machine.cores_and_memory(tmp_path)}
    assert ("memory limit" in names) == (memory is not None)


def test_shared_memory_that_is_missing_or_small(checkups, tmp_path, monkeypatch):
    assert checkups.machine.shared_memory(tmp_path / "none").verdict == "failed"
    usage = SimpleNamespace(total=64 * 2**20, free=64 * 2**20)
    monkeypatch.setattr(checkups.machine.shutil, "disk_usage", lambda folder: usage)
    small = checkups.machine.shared_memory(tmp_path)
    assert (small.verdict, small.text) == ("warning", "0.06 GiB, 0.06 free")
    usage.free = 2**31
    assert checkups.machine.shared_memory(tmp_path).verdict == "ok"


@pytest.mark.parametrize(
    ("variable", "value", "verdict"),
    [
        ("GLOO_SOCKET_IFNAME", "", "ok"),
        ("GLOO_SOCKET_IFNAME", "eth0", "ok"),
        ("GLOO_SOCKET_IFNAME", "eth", "failed"),  # gloo wants the whole name
        ("NCCL_SOCKET_IFNAME", "eth", "ok"),
        ("NCCL_SOCKET_IFNAME", "=eth", "failed"),
        ("NCCL_SOCKET_IFNAME", "=eth1,eth0", "ok"),
        ("NCCL_SOCKET_IFNAME", "ib", "failed"),
        ("NCCL_SOCKET_IFNAME", "^ib,lo", "ok"),
        ("NCCL_SOCKET_IFNAME", "^eth,lo", "failed"),
    ],
)
def test_interfaces_that_are_named(checkups, monkeypatch, variable, value, verdict):
    states = {name: SimpleNamespace(isup=True, speed=0, mtu=1500) for name in ("lo", "eth0")}
    monkeypatch.setattr(checkups.network.psutil, "net_if_stats", lambda: states)
    found = {f.name: f for f in checkups.network.network({variable: value})}
    assert found[variable].verdict == verdict


SMI = """#!/bin/sh
case $1 in
  -L) echo "GPU 0: NVIDIA H100 (UUID: x)" ;;
  topo) echo "GPU0 NV18" ;;
  *) printf 'NVIDIA H100, 81559, 3, 570.1\\nNVIDIA H100, 81559, 70000, 570.1\\n' ;;
esac
"""


def test_gpus_that_are_used_and_gpus_that_are_lost(checkups, monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    kinds, busy, topology = checkups.software.gpus()
    assert kinds.text == "2 x NVIDIA H100, 81559 MiB, driver 570.1"
    assert (busy.name, busy.text, busy.verdict) == ("GPU 1", "70000 MiB in use", "warning")
    assert topology.text == "GPU0 NV18"
    monkeypatch.setattr(checkups.software, "device_files", lambda: ["/dev/nvidia0"])
    assert checkups.software.gpus_answer().verdict == "ok"
    monkeypatch.setattr(checkups.software, "device_files", lambda: ["/dev/nvidia0", "/dev/nvidia1"])
    lost = checkups.software.gpus_answer()
    assert (lost.verdict, lost.text) == ("failed", "1 of 2 answer")
    assert [f.text for f in checkups.software.libraries() if f.failed] == ["0 of 2"]  # torch here has no CUDA


def test_the_folder_of_a_run(checkups, tmp_path):
    found = {f.name: f for f in checkups.storage.run_folder(tmp_path / "not" / "yet")}
    assert list(found) == ["room", "write speed", "clock of the files"]
    assert found["write speed"].value["gb_per_s"] > 0 and not list(tmp_path.iterdir())
    assert found["clock of the files"].verdict == "ok"
    [refused] = checkups.storage.run_folder(Path("/proc/none"))
    assert refused.verdict == "failed" and refused.text.startswith("/proc: ")


def test_health_is_quick_and_needs_no_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = "import runpy, sys; sys.argv[1:] = ['--health']\ntry: runpy.run_path(%r, run_name='__main__')\n"
    program = program % str(DOCTOR) + "finally: assert not {'torch', 'vllm'} & set(sys.modules)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TOOLS)!r})\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "shared memory" in done.stdout and done.stdout.splitlines()[-1].startswith("0 failed, ")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_health_fails_without_a_package(checkups, monkeypatch):
    monkeypatch.setattr(checkups.software, "NEEDED", ("torch", "no-such-package"))
    [lacking] = [f for f in checkups.software.packages() if f.failed]
    assert (lacking.name, lacking.text) == ("no-such-package", "not installed")


# --- several hosts


def test_the_offset_of_a_clock(checkups):
    """Ours is 2 s ahead; the second exchange took 0.2 s, 0.1 s each way, the first one's answer came late."""
    times = [(12.0, 10.5, 13.0), (22.0, 20.1, 22.2), (32.0, 30.9, 33.1)]
    assert checkups.ranks.clock_offset(times) == (pytest.approx(2.0), pytest.approx(0.1))


def test_rings_of_links(checkups):
    assert checkups.links.rings(4, 2) == {"inside hosts": [1, 0, 3, 2], "between hosts": [2, 3, 0, 1]}
    assert checkups.links.rings(2, 1) == {"between hosts": [1, 0]}
    assert checkups.links.rings(3, 3) == {"inside hosts": [1, 2, 0]}
    assert checkups.links.rings(1, 1) == {}


@pytest.mark.parametrize(
    ("backend", "rates", "verdict"),
    [
        ("gloo", [1e9, 1.2e9, 1e9, 0.9e9], "ok"),
        ("gloo", [1e9, 1.2e9, 1e9, 0.4e9], "warning"),  # one is slower than the others
        ("gloo", [0.05e9] * 4, "warning"),
        ("nccl", [1e9] * 4, "warning"),
        ("nccl", [4e10] * 4, "ok"),
    ],
)
def test_slow_links(checkups, backend, rates, verdict):
    found = checkups.links.verdict(backend, "between hosts", rates, [2, 3, 0, 1])
    assert found.verdict == verdict
    slowest = rates.index(min(rates))
    assert f"slowest from rank {slowest} to {[2, 3, 0, 1][slowest]}" in found.text


def test_other_versions_on_another_host(checkups):
    Finding = checkups.findings.Finding
    by_host = {
        host: [
            Finding(section="software", name="torch", text=text),
            Finding(section="other", name="x", text=host),
        ]
        for host, text in (("a", "2.13"), ("b", "2.12"), ("c", "2.13"))
    }
    found = checkups.ranks.same_software(by_host, "software")
    assert (found.verdict, found.text) == ("warning", "torch: 2.13 on a, c; 2.12 on b")


def test_clocks_and_folders_through_the_store(checkups, tmp_path, monkeypatch):
    """Two hosts as threads, with one folder; the clock of the second is an hour ahead."""
    store = dist.HashStore()
    meetings = [checkups.ranks.Meeting(rank=r, world=2, ranks_per_host=1, store=store) for r in range(2)]
    asker = threading.current_thread()
    clock = SimpleNamespace(
        time=lambda: time.time() + 3600 * (threading.current_thread() is asker),
        monotonic=time.monotonic,
        sleep=time.sleep,
        time_ns=time.time_ns,
    )
    monkeypatch.setattr(checkups.ranks, "time", clock)

    def both(test):
        other = threading.Thread(target=test, args=(meetings[0],))
        other.start()
        found = test(meetings[1])
        other.join()
        return found

    [found] = both(checkups.ranks.clock)
    assert found.verdict == "warning" and found.value["ahead_seconds"] == pytest.approx(3600, abs=1)
    [found] = both(lambda meeting: checkups.ranks.shared_folder(meeting, tmp_path / "run"))
    assert found.verdict == "ok" and not list(tmp_path.iterdir())


@pytest.mark.skipif(reason_against() is not None, reason=reason_against() or "")
def test_two_hosts_under_torchrun(tmp_path):
    """Each has a /dev/shm of its own, so a run there would be refused."""
    secrets = {"HF_TOKEN": "hf_verysecret", "https_proxy": "http://me:hf_verysecret@proxy:1"}
    environment = {**os.environ, **secrets, "GLOO_SOCKET_IFNAME": CARD, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    options = ["--json", "--run-dir", "/dev/shm/run", "--peers", "host0,host1:29501"]
    with Hosts(2) as hosts:
        running = [
            hosts[i].popen(
                [*launcher, f"--node-rank={i}", "--master-addr=host0", str(DOCTOR), *options],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        (report, error), (nothing, _) = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [1, 1], error
    assert nothing == "" and "hf_verysecret" not in report + error
    found = json.loads(report)
    assert found["hosts"] == ["host0", "host1"]
    lines = {(line["host"], line["name"]): line for line in found["findings"]}
    assert [key for key, line in lines.items() if line["verdict"] == "failed"] == [("host1", "run.dir")]
    assert lines["host1", "run.dir"]["text"] == "/dev/shm is not the folder of rank 0's host"
    assert abs(lines["host1", "clock"]["value"]["ahead_seconds"]) < 0.1
    assert lines["", "gloo, between hosts"]["value"]["least_gb_per_s"] > 0
    assert lines["", "gloo, all-reduce"]["value"]["gb_per_s"] > 0
    assert lines["", "software"]["text"] == "the same on all hosts"
    assert lines["host1", "host0"]["text"].endswith(f"by {CARD}; port 29500 is open")
    assert lines["host0", "host1"]["text"].endswith(f"by {CARD}; port 29501 is closed")
    assert lines["host1", "to MASTER_ADDR"]["text"] == f"host0 by {CARD}"
