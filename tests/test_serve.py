"""python -m megatron_dapo.serve as a process, against a store on which this test plays rank 0. Its engines
are fakes.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.hosts import RemoteServer
from megatron_dapo.rollout.serving import settings
from megatron_dapo.serve import _address, main
from megatron_dapo.sync.host_link import key

KEY = "megatron_dapo/serving"
# Servers that only sleep, and quick clocks.
SERVE = """
import sys
from megatron_dapo import serve
from megatron_dapo.lifeline import Clocks
from megatron_dapo.rollout import serving
from megatron_dapo.rollout.server import EngineServer
EngineServer.arguments = lambda self, port: ["-c", "import time; print('up', flush=True); time.sleep(600)"]
serving.CLOCKS = Clocks(beat_s=0.3)
serve.LOOK_S = 0.1
if __name__ == "__main__":
    sys.exit(serve.main())
"""


LIFELINE = """
import time
from megatron_dapo.lifeline import Clocks, Lifeline
lifeline = Lifeline.serve("token", (), print, address="127.0.0.1", clocks=Clocks(beat_s=0.3))
print(lifeline.port, flush=True)
while not any(peer.name for peer in lifeline._peers):
    time.sleep(0.05)
print("joined", flush=True)
time.sleep(600)
"""


class RankZero:
    """The store of a run, and rank 0's end of the lifeline."""

    def __init__(self, tmp_path: Path) -> None:
        self.store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
        )
        self.file = tmp_path / "config.yaml"
        values = {
            "model": {"path": str(tmp_path)},
            "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
            "rollout": {"engines": 2, "colocated": False, "start_timeout_s": 20},
        }
        (tmp_path / "config.json").write_text("{}")
        self.config = RunConfig.make(values)
        self.file.write_text(self.config.dump())
        self.processes: list[subprocess.Popen[str]] = []

    def open(self) -> None:
        run = {"first": 4, "settings": settings(self.config)}
        self.store.set(f"{KEY}/run", json.dumps(run))

    def give_lifeline(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", LIFELINE]
        self.processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stdout = self.processes[-1].stdout
        assert stdout
        said = {"port": int(stdout.readline()), "token": "token"}
        self.store.set(f"{KEY}/lifeline", json.dumps(said))
        return self.processes[-1]

    def serve(self, *overrides: str, port: int = 0) -> subprocess.Popen[str]:
        address = f"127.0.0.1:{port or self.store.port}"
        command = [sys.executable, "-c", SERVE, str(self.file), *overrides, "--join", address]
        pipe = subprocess.PIPE
        self.processes.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True))
        return self.processes[-1]

    def until(self, holds: Callable[[], object], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            for process in self.processes:
                assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def has(self, name: str) -> bool:
        return self.store.check([f"{KEY}/{name}"])


@pytest.fixture
def rank_0(tmp_path) -> Iterator[RankZero]:
    rank_0 = RankZero(tmp_path)
    yield rank_0
    for process in rank_0.processes:
        process.kill()
        process.communicate()


def start_engine(rank_0: RankZero, index: int) -> RemoteServer:
    """Have an engine of the first host started, as the fleet does."""
    name = json.loads(rank_0.store.get(f"{KEY}/0/host"))["name"]
    server = RemoteServer(rank_0.store, index, name, "token")
    server.start()

    def has_address() -> bool:
        with contextlib.suppress(ValueError):
            return bool(server.url)
        return False

    rank_0.until(has_address)
    return server


def sleepers(process: subprocess.Popen[str]) -> list[int]:
    """Its engines."""
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(pid) for path in children for pid in path.read_text().split()]


def serve_an_engine(rank_0: RankZero) -> tuple[subprocess.Popen[str], int]:
    """A host that has joined, and its engine."""
    rank_0.open()
    process = rank_0.serve()
    rank_0.until(lambda: rank_0.has("0/host"))
    start_engine(rank_0, 4)
    [engine] = sleepers(process)
    return process, engine


def test_a_host_serves_and_leaves(rank_0):
    """It waits for the run, starts engines, carries weights, drains, and ends with 0."""
    process = rank_0.serve()
    time.sleep(0.5)
    rank_0.open()
    rank_0.until(lambda: rank_0.has("0/host"))
    said = json.loads(rank_0.store.get(f"{KEY}/0/host"))
    assert (said["first"], said["engines"]) == (4, 2) and said["name"].startswith("serve 0 on ")
    server = start_engine(rank_0, 5)
    assert server.url.startswith("http://127.0.0.1:") and len(sleepers(process)) == 1

    order = {"number": 1, "token": "a" * 32, "num_bytes": 4096}
    rank_0.store.set(f"{key(said['name'])}/order", json.dumps(order))
    rank_0.until(lambda: rank_0.store.check([f"{key(said['name'])}/answer/1"]))
    answer = json.loads(rank_0.store.get(f"{key(said['name'])}/answer/1"))
    assert (
        answer["path"].startswith(f"/proc/{process.pid}/fd/") and Path(answer["path"]).stat().st_size == 4096
    )

    process.send_signal(signal.SIGTERM)
    rank_0.until(lambda: rank_0.has("0/leaves"))
    time.sleep(0.3)
    assert process.poll() is None and len(sleepers(process)) == 1, "its engines still work"
    server.stop()
    assert server.poll() == 0
    rank_0.store.set(f"{KEY}/0/left", "")
    out, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (0, "")
    assert "has joined with engines 4 to 5" in out and out.rstrip().endswith("has left")


def test_the_end_of_the_run_is_the_end_of_its_hosts(rank_0):
    process, engine = serve_an_engine(rank_0)
    rank_0.store.set(f"{KEY}/ended", "")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and out.rstrip().endswith("the run has ended")
    assert rank_0.has("0/knows") and not Path(f"/proc/{engine}").exists()


def test_a_run_that_falls_silent_ends_its_hosts(rank_0):
    process, engine = serve_an_engine(rank_0)
    lifeline = rank_0.give_lifeline()
    assert lifeline.stdout and lifeline.stdout.readline() == "joined\n"
    lifeline.send_signal(signal.SIGSTOP)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and re.search("rank 0 on .* has given no sign of life for 1.5 s", error)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{engine}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_whose_store_is_gone_ends_its_hosts(rank_0, tmp_path):
    code = (
        "import torch.distributed as dist, time\n"
        "store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\n"
        "time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout
        port = int(other.stdout.readline())
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        store.set(f"{KEY}/run", json.dumps({"first": 4, "settings": settings(rank_0.config)}))
        process = rank_0.serve(port=port)
        rank_0.until(lambda: store.check([f"{KEY}/0/host"]))
    finally:
        other.kill()
        other.communicate()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and "error: the run" in error and "Traceback" not in error


def test_a_host_with_other_settings_is_refused(rank_0):
    rank_0.open()
    process = rank_0.serve("rollout.max_tokens=7")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "error: rollout.max_tokens=7 differs from 1024" in error


def test_a_host_that_rank_0_refuses_says_why(rank_0):
    rank_0.open()
    process = rank_0.serve()
    rank_0.until(lambda: rank_0.has("0/host"))
    rank_0.store.set(f"{KEY}/0/left", "ulimit -n")
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2 and "ulimit -n" in error


def test_a_host_that_waits_for_its_run_ends_at_a_signal_and_in_time(rank_0):
    process = rank_0.serve()
    late = rank_0.serve("rollout.start_timeout_s=0.5")
    _, error = late.communicate(timeout=60)
    assert late.returncode == 2 and "no run has let this host join within" in error
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.parametrize("text", ["host0", ":29500", "host0:", "host0:port"])
def test_a_wrong_address_is_named(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: model}\n")
    assert main([str(file), "--join", text]) == 2
    assert f"--join {text} must be MASTER_ADDR:MASTER_PORT" in capsys.readouterr().err


def test_an_address_may_be_one_of_ipv6():
    assert _address("[fd00::1]:29500") == ("fd00::1", 29500) and _address("host0:1") == ("host0", 1)
