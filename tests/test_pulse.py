"""A process whose interpreter one call holds gives signs of life all the same, and one that is stopped
or gone does not. Real processes on the loopback; the clocks are shortened.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from megatron_dapo.lifeline import Clocks, Lifeline, Loss

TOKEN = "the run's"
SHORT = Clocks(beat_s=0.1, silent_beats=10)
HELD_S = 3.0  # three times the silence

# Joins (or serves, if there is no port); then each line of its input is a number of seconds for which a call
# into C holds its interpreter.
PROCESS = """
import ctypes, sys
from megatron_dapo.lifeline import Clocks, Lifeline
port, held_s = int(sys.argv[1]), float(sys.argv[2])
clocks = Clocks(beat_s=0.1, silent_beats=10, held_s=held_s)
lost = lambda loss: print("lost", loss.reason, flush=True)
if port:
    lifeline = Lifeline.join(("127.0.0.1", port), "the run's", "rank 1", lost, clocks=clocks)
else:
    lifeline = Lifeline.serve("the run's", ["rank 1"], lost, address="127.0.0.1", clocks=clocks)
print(lifeline.port, flush=True)
for line in sys.stdin:
    ctypes.PyDLL(None).usleep(int(float(line) * 1e6))
    print("held", flush=True)
"""
# 127 ranks in one process: they join, answer nothing and give a sign of life with every beat.
RANKS = """
import json, select, socket, sys, time
port, beat_s = int(sys.argv[1]), float(sys.argv[2])
socks = []
for rank in range(1, 128):
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(json.dumps(["hello", "the run's", f"rank {rank}", "host"]).encode() + b"\\n")
    sock.makefile("rb", buffering=0).readline()
    sock.setblocking(False)
    socks.append(sock)
print("joined", flush=True)
while True:
    time.sleep(beat_s)
    for sock in socks:
        sock.send(b"\\n")
        try:
            sock.recv(1 << 16)
        except BlockingIOError:
            pass
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def process(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        return processes[-1]

    yield process
    for process_ in processes:
        process_.kill()
        process_.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def hold(process: subprocess.Popen[str], seconds: float) -> None:
    assert process.stdin
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()


@pytest.fixture
def hub() -> Iterator[Lifeline]:
    """Rank 0 here. `losses` has what it lost."""
    losses: list[Loss] = []
    lifeline = Lifeline.serve(TOKEN, ["rank 1"], losses.append, address="127.0.0.1", clocks=SHORT)
    lifeline.losses = losses
    yield lifeline
    lifeline.close()


def test_a_rank_whose_interpreter_is_held_is_not_lost(hub, start):
    rank = start(PROCESS, hub.port, 60)
    said(rank)
    hold(rank, HELD_S)
    assert said(rank) == "held"
    assert not hub.losses


def test_rank_0_whose_interpreter_is_held_is_not_lost(start):
    rank_0, losses = start(PROCESS, 0, 60), []
    lifeline = Lifeline.join(("127.0.0.1", int(said(rank_0))), TOKEN, "rank 1", losses.append, clocks=SHORT)
    try:
        hold(rank_0, HELD_S)
        assert said(rank_0) == "held"
        time.sleep(0.5)  # nor has it counted our silence
        assert not losses
    finally:
        lifeline.close()


def test_an_interpreter_that_is_held_for_too_long_counts_as_silent(hub, start):
    rank = start(PROCESS, hub.port, 1.0)
    said(rank)
    hold(rank, 60)
    until(lambda: hub.losses, 10)
    assert "has given no sign of life for 1 s" in hub.losses[0].reason


@pytest.mark.parametrize("sign", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_is_stopped_or_killed_is_lost(hub, start, sign):
    rank = start(PROCESS, hub.port, 60)
    said(rank)
    [pulse] = psutil.Process(rank.pid).children()
    began = time.monotonic()
    rank.send_signal(sign)
    until(lambda: hub.losses, 10)
    seconds = time.monotonic() - began
    if sign == signal.SIGSTOP:
        assert seconds > 0.8 and "has given no sign of life" in hub.losses[0].reason
    else:
        assert "has ended without a word" in hub.losses[0].reason
        until(lambda: not pulse.is_running() or pulse.status() == psutil.STATUS_ZOMBIE, 5)


def test_a_connection_that_is_dropped_is_closed(hub):
    """Though the process beside ours has it open, too."""
    with socket.create_connection(("127.0.0.1", hub.port), timeout=5) as sock:
        sock.sendall(json.dumps(["hello", TOKEN, "engines", "host"]).encode() + b"\n")
        assert json.loads(sock.makefile("rb", buffering=0).readline())[0] == "welcome"
        sock.sendall(b"GET / HTTP/1.1\n")
        until(lambda: not sock.recv(100), 5)  # signs of life, and then the end
    until(lambda: hub.losses, 5)
    assert hub.losses[0].peer == "engines"


@pytest.mark.parametrize("beats", [100, pytest.param(1800, marks=pytest.mark.slow)])
def test_rank_0_watches_127_others_at_small_cost(start, beats):
    """1800 beats are two hours of a real run. Nobody is taken for lost, and the thread of rank 0 takes less
    than 20 ms of a core for each beat of 4 s.
    """
    clocks, losses = Clocks(beat_s=0.025, silent_beats=400), []
    names = [f"rank {rank}" for rank in range(1, 128)]
    hub = Lifeline.serve(TOKEN, names, losses.append, address="127.0.0.1", clocks=clocks)
    try:
        assert said(start(RANKS, hub.port, clocks.beat_s)) == "joined"
        [thread] = [t for t in threading.enumerate() if t is hub._thread]
        clock = time.pthread_getcpuclockid(thread.ident)
        before = time.clock_gettime(clock)
        time.sleep(beats * clocks.beat_s)
        seconds_a_beat = (time.clock_gettime(clock) - before) / beats
    finally:
        hub.close()
    print(f"{1e3 * seconds_a_beat:.2f} ms of a core a beat")
    assert not losses
    assert seconds_a_beat < 0.02


def until(condition: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
