"""Who is gone is noticed, on both ends, and who leaves in order is not. Real sockets and processes on the
loopback; the clocks are shortened.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from megatron_dapo.lifeline import Clocks, Lifeline, LifelineRefused, Loss, set_keepalive

TOKEN = "the run's"
SHORT = Clocks(beat_s=0.1, silent_beats=10, grace_s=0.4)
SILENCE = "has given no sign of life for 1 s: its process is stopped, or its host or network is down"

# A process that joins and lives until it is told otherwise on its standard input.
JOINS = """
import os, sys, time
from megatron_dapo.lifeline import Clocks, Lifeline
clocks = Clocks(beat_s=0.1, silent_beats=10)
print("ready", flush=True)
port, name = int(sys.stdin.readline()), sys.stdin.readline().strip()
lifeline = Lifeline.join(("127.0.0.1", port), "the run's", name, print, clocks=clocks)
print("joined", flush=True)
order = sys.stdin.readline().strip()
if order == "fail":
    lifeline.close("the disk is full")
if order == "vanish":
    os._exit(0)
"""


class Run:
    """Rank 0 and the processes that joined it, with what each lost."""

    def __init__(self) -> None:
        self.losses: dict[str, list[Loss]] = {}
        self.ends = contextlib.ExitStack()

    def serve(self, *expected: str, clocks: Clocks = SHORT) -> Lifeline:
        losses = self.losses["rank 0"] = []
        self.hub = Lifeline.serve(TOKEN, expected, losses.append, address="127.0.0.1", clocks=clocks)
        self.ends.callback(self.hub.close)
        return self.hub

    def join(self, name: str, token: str = TOKEN, clocks: Clocks = SHORT) -> Lifeline:
        losses = self.losses[name] = []
        address = ("127.0.0.1", self.hub.port)
        lifeline = Lifeline.join(address, token, name, losses.append, clocks=clocks)
        self.ends.callback(lifeline.close)
        return lifeline

    def process(self) -> subprocess.Popen[str]:
        """One that has imported what it needs; it may take longer to start than a short silence."""
        pipe = subprocess.PIPE
        child = self.ends.enter_context(
            subprocess.Popen([sys.executable, "-c", JOINS], stdin=pipe, stdout=pipe, text=True)
        )
        self.ends.callback(child.kill)
        assert child.stdout and child.stdout.readline() == "ready\n"
        return child

    def let_join(self, child: subprocess.Popen[str], name: str) -> None:
        self.order(child, f"{self.hub.port}\n{name}")
        assert child.stdout and child.stdout.readline() == "joined\n"

    def order(self, child: subprocess.Popen[str], word: str) -> None:
        assert child.stdin
        child.stdin.write(word + "\n")
        child.stdin.flush()


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run()
    with run.ends:
        yield run


def until(condition: Callable[[], object], timeout_s: float = 10) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.01)
    return time.monotonic() - began


HOST = socket.gethostname()


def test_a_killed_process_is_noticed_at_once_and_all_are_told(run):
    child = run.process()
    run.serve("rank 1", "rank 2", clocks=Clocks())  # even with the clocks of a real run
    run.join("rank 2", clocks=Clocks())
    run.let_join(child, "rank 1")
    child.kill()
    until(lambda: run.losses["rank 2"], 5)
    (here,), (there,) = run.losses["rank 0"], run.losses["rank 2"]
    assert here.peer == "rank 1" and not here.told
    assert here.reason.startswith(f"rank 1 on {HOST} has ended without a word")
    assert there == Loss(peer="rank 0", reason=here.reason, told=True)


def test_a_stopped_process_is_noticed_after_its_silence_and_notices_when_it_goes_on(run):
    child = run.process()
    run.serve("rank 1", "rank 2")
    run.join("rank 2")
    run.let_join(child, "rank 1")
    child.send_signal(signal.SIGSTOP)
    took = until(lambda: run.losses["rank 2"])
    assert took > SHORT.silence_s - 2 * SHORT.beat_s
    assert run.losses["rank 0"] == [Loss(peer="rank 1", reason=f"rank 1 on {HOST} {SILENCE}")]
    child.send_signal(signal.SIGCONT)
    assert child.stdout and "rank 0" in child.stdout.readline()


def test_who_was_stopped_takes_nobody_for_dead(run):
    """Its clock has jumped by several silences, but it was itself that did not listen."""
    child = run.process()
    run.serve("rank 1", clocks=Clocks(beat_s=0.1, silent_beats=1000))
    run.let_join(child, "rank 1")
    child.send_signal(signal.SIGSTOP)
    time.sleep(3 * SHORT.silence_s)
    child.send_signal(signal.SIGCONT)
    time.sleep(SHORT.silence_s)
    run.order(child, "fail")
    until(lambda: run.losses["rank 0"] or run.hub.loss)
    assert child.stdout and child.stdout.read() == ""  # no loss was reported there
    assert "the disk is full" in run.hub.loss.reason


def test_rank_0_that_is_lost_is_noticed_by_all(run):
    code = (
        "import sys, time; from megatron_dapo.lifeline import Clocks, Lifeline\n"
        "hub = Lifeline.serve(\"the run's\", ['rank 1', 'rank 2'], print, address='127.0.0.1')\n"
        "print(hub.port, flush=True); time.sleep(60)"
    )
    hub = run.ends.enter_context(
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    )
    run.ends.callback(hub.kill)
    run.hub = type("Hub", (), {"port": int(hub.stdout.readline())})
    lifelines = [run.join(name, clocks=Clocks()) for name in ("rank 1", "rank 2")]
    hub.kill()
    until(lambda: run.losses["rank 1"] and run.losses["rank 2"], 5)
    assert [lifeline.settle(1) for lifeline in lifelines] == [*run.losses["rank 1"], *run.losses["rank 2"]]
    for name in ("rank 1", "rank 2"):
        assert run.losses[name][0].peer == "rank 0" and not run.losses[name][0].told
        assert f"rank 0 on {HOST} has ended without a word" in run.losses[name][0].reason


def test_an_orderly_end_is_no_loss_in_whatever_order(run):
    child = run.process()
    hub = run.serve("rank 1", "rank 2", "rank 3")
    first, second = run.join("rank 1"), run.join("rank 2")
    run.let_join(child, "rank 3")
    first.close()
    run.order(child, "return")  # a process that ends without closing its lifeline says goodbye too
    assert child.wait(10) == 0
    time.sleep(2 * SHORT.silence_s)
    hub.close()
    time.sleep(2 * SHORT.silence_s)
    second.close()
    assert run.losses == {"rank 0": [], "rank 1": [], "rank 2": []}
    assert hub.loss is second.loss is None
    hub.close()  # a second time


def test_a_quiet_run_goes_on(run):
    run.serve("rank 1")
    run.join("rank 1")
    time.sleep(3 * SHORT.silence_s)
    assert run.losses == {"rank 0": [], "rank 1": []}


def test_a_process_that_never_joins_is_lost(run):
    run.serve("rank 1", "rank 2")
    run.join("rank 1")
    until(lambda: run.losses["rank 1"])
    assert run.losses["rank 0"][0].reason == "rank 2 has not connected to rank 0 within 1 s"


# --- errors that a process reports itself -----------------------------------------------


def test_a_failure_is_reported_after_rank_0_had_time_to_end_by_itself(run):
    run.serve("rank 1", "rank 2")
    run.join("rank 2")
    failed = run.join("rank 1")
    failed.close("lower the learning rate")
    took = until(lambda: run.losses["rank 0"])
    assert took > SHORT.grace_s - 0.1
    reason = f"rank 1 on {HOST} has failed: lower the learning rate"
    assert run.losses["rank 0"] == [Loss(peer="rank 1", reason=reason)]
    until(lambda: run.losses["rank 2"])
    assert run.losses["rank 2"] == [Loss(peer="rank 0", reason=reason, told=True)]


def test_rank_0_that_ends_meanwhile_speaks_for_itself(run):
    hub = run.serve("rank 1", "rank 2")
    run.join("rank 2")
    run.join("rank 1").close("lower the learning rate")
    until(lambda: hub.loss)
    hub.close("lower the learning rate, says rank 0")
    assert run.losses["rank 0"] == []
    until(lambda: run.losses["rank 2"])
    assert run.losses["rank 2"][0].reason == "lower the learning rate, says rank 0"


def test_a_process_that_is_gone_ends_the_grace_of_one_that_failed(run):
    child = run.process()
    run.serve("rank 1", "rank 2", clocks=Clocks(grace_s=60))
    run.join("rank 1", clocks=Clocks()).close("its neighbour is gone")
    run.let_join(child, "rank 2")
    child.kill()
    until(lambda: run.losses["rank 0"], 5)
    assert run.losses["rank 0"][0].reason.startswith(f"rank 2 on {HOST} has ended without a word")


def test_settling_waits_for_a_loss_and_for_no_grace(run):
    hub = run.serve("rank 1", clocks=Clocks(grace_s=60))
    assert hub.settle(0.05) is None
    lifeline = run.join("rank 1", clocks=Clocks())
    threading.Timer(0.3, lifeline.close, ["the disk is full"]).start()
    loss = hub.settle(5)
    assert loss is not None and "the disk is full" in loss.reason
    assert run.losses["rank 0"] == [loss]  # reported by the time that settle returns
    assert hub.settle(0.05) is loss and run.losses["rank 0"] == [loss]


# --- strangers --------------------------------------------------------------------------


@contextlib.contextmanager
def stranger(port: int, said: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(said)
        yield sock


def test_another_runs_token_is_refused_and_ends_nothing(run):
    run.serve("rank 1")
    with pytest.raises(
        LifelineRefused, match="rank 0 at 127.0.0.1 port .* refused rank 1 .*another run's token"
    ):
        run.join("rank 1", token="another run's")
    run.join("rank 1")
    with pytest.raises(LifelineRefused, match="a name that has joined already"):
        run.join("rank 1")
    time.sleep(2 * SHORT.silence_s)
    assert run.losses["rank 0"] == []


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b'["bye"]\n',
        b'["failed", "x"]\n',
        b'["end", "x"]\n',
        b'["hello", "x", "rank 1", "h"]\n',
        b'["hello", "the run\'s", "", "h"]\n',
        b"\xff\xfe\n",
        b"[" * 50_000 + b"\n",
        b"x" * 200_000,
    ],
)
def test_a_stranger_is_cut_off_and_ends_nothing(run, said):
    run.serve("rank 1")
    run.join("rank 1")
    with stranger(run.hub.port) as sock, contextlib.suppress(OSError):
        sock.sendall(said)
        assert sock.recv(1) == b""  # by silence at the latest; or reset, with unread bytes
    time.sleep(2 * SHORT.beat_s)
    assert run.losses == {"rank 0": [], "rank 1": []} and run.hub.loss is None


def test_a_stranger_that_keeps_sending_is_cut_off_too(run):
    run.serve()
    with stranger(run.hub.port) as sock:
        until(lambda: _is_cut(sock))


def _is_cut(sock: socket.socket) -> bool:
    try:
        sock.sendall(b"\n")
    except OSError:
        return True
    time.sleep(0.05)
    return False


def test_a_process_that_was_not_expected_is_watched_and_does_not_end_the_run(run):
    child = run.process()
    run.serve("rank 1")
    run.join("rank 1")
    run.let_join(child, "engines")
    child.kill()
    until(lambda: run.losses["rank 0"], 5)
    assert run.losses["rank 0"][0].peer == "engines"
    assert run.hub.loss is None and run.losses["rank 1"] == []


def test_nobody_listens(run):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run.hub = type("Hub", (), {"port": port})
    with pytest.raises(LifelineRefused, match=f"rank 1 on .* cannot reach rank 0 at 127.0.0.1 port {port}"):
        run.join("rank 1")


def test_something_else_answers(run):
    server = socket.create_server(("127.0.0.1", 0))
    run.ends.enter_context(server)

    def answer() -> None:
        sock, _ = server.accept()
        with sock:
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n")

    threading.Thread(target=answer).start()
    run.hub = type("Hub", (), {"port": server.getsockname()[1]})
    with pytest.raises(LifelineRefused, match="refused rank 1"):
        run.join("rank 1")


# --- keepalive --------------------------------------------------------------------------


@pytest.mark.parametrize("timeout_s", [6, 30])
def test_the_kernel_gives_up_after_the_time_out(timeout_s):
    with socket.socket() as sock:
        set_keepalive(sock, timeout_s)
        tcp = {
            name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"))
            for name in ("KEEPIDLE", "KEEPINTVL", "KEEPCNT", "USER_TIMEOUT")
        }
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert tcp["KEEPIDLE"] + tcp["KEEPINTVL"] * tcp["KEEPCNT"] == timeout_s
        assert tcp["USER_TIMEOUT"] == 1000 * timeout_s


def test_the_token_stays_out_of_messages(run):
    run.serve("rank 1")
    with pytest.raises(LifelineRefused) as refusal:
        run.join("rank 1", token="a secret")
    assert "a secret" not in str(refusal.value) and TOKEN not in json.dumps(str(refusal.value))
