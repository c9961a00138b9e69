"""Network namespaces as hosts: `with Hosts(2) as hosts: hosts[0].popen([...])`. Needs root, iproute2 and
util-linux.

Hosts are 10.77.0.1, 10.77.0.2, ..., by name host0, host1, ..., on one switch. Each has its own network,
processes, hostname and /dev/shm; files are shared. Nothing has a name outside: one process holds each
namespace open, and reads a pipe of ours. When we end, even by kill -9, the pipes close, those processes end,
and the kernel ends what ran inside and drops namespaces and cables.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NET = "10.77.0"
CARD = "eth0"  # of every host
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
# cat becomes process 1; as it ignores SIGCHLD the kernel collects orphans. $pid: its number outside.
HOLD = "trap '' CHLD; echo $pid; exec cat >/dev/null"
BOOT = f"""
set -e
read pid rest </proc/self/stat
mount -t proc proc /proc
hostname "$1"
mount -t tmpfs -o size=4g tmpfs /dev/shm
printf '%s' "$2" >/dev/shm/.hosts
mount --bind /dev/shm/.hosts /etc/hosts
{HOLD}
"""


def reason_against() -> str | None:
    """Why no hosts can be made here, or None."""
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter", "setpriv") if not shutil.which(tool)]
    if missing:
        return f"network namespaces need {', '.join(missing)} (iproute2, util-linux)"
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        return "network namespaces need root"
    return None


class Host:
    """One host. `init` is its process 1, by the number that it has outside."""

    def __init__(self, index: int, holder: subprocess.Popen[bytes], switch: Switch) -> None:
        self.index, self.name, self.address = index, f"host{index}", f"{NET}.{index + 1}"
        self.init = _started(holder, self.name)
        self._holder, self._switch = holder, switch

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process here. `kill()` ends it at once; other signals do not reach it."""
        enter = ("nsenter", "--target", str(self.init), "--net", "--uts", "--ipc", "--pid", "--mount")
        folder = f"--wdns={os.getcwd()}"  # else it would start in /
        return subprocess.Popen([*enter, folder, "--", *DIES_WITH_US, *command], **options)

    def cut(self) -> None:
        """Packets vanish in both directions: a dead switch, or a peer without power."""
        self._switch.ip(f"link set port{self.index} nomaster")

    def mend(self) -> None:
        self._switch.ip(f"link set port{self.index} master lan")

    def slow(self, megabits: float) -> None:
        """What the host receives from then on comes at most at that rate, per second (a token bucket)."""
        bucket = f"tbf rate {megabits}mbit burst 32kb latency 1s"
        self._switch.tc(f"qdisc replace dev port{self.index} root {bucket}")

    def fast(self) -> None:
        self._switch.tc(f"qdisc del dev port{self.index} root")

    def kill(self) -> None:
        """End every process of the host at once. The kernel still says goodbye to their peers."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self._holder.wait()

    def power_off(self) -> None:
        """End every process of the host without a word to anyone."""
        self.cut()
        self.kill()


class Switch:
    """A bridge in a namespace of its own, so that hosts share nothing with the machine that they run on."""

    def __init__(self, holder: subprocess.Popen[bytes]) -> None:
        self.init = _started(holder, "the switch")

    def ip(self, *lines: str) -> None:
        _batch("ip", self.init, *lines)

    def tc(self, *lines: str) -> None:
        _batch("tc", self.init, *lines)


class Hosts:
    """`count` hosts. Use the `with` in a thread that lives as long as they do."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._holders: list[subprocess.Popen[bytes]] = []
        self._hosts: list[Host] = []

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __enter__(self) -> Hosts:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        names = "127.0.0.1 localhost\n" + "".join(f"{NET}.{i + 1} host{i}\n" for i in range(self._count))
        switch = self._hold(["unshare", "--net", "sh", "-c", f"read pid rest </proc/self/stat; {HOLD}"])
        private = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child"]
        holders = [
            self._hold([*private, "sh", "-c", BOOT, "boot", f"host{i}", names]) for i in range(self._count)
        ]
        lan = Switch(switch)
        self._hosts = [Host(i, holder, lan) for i, holder in enumerate(holders)]
        cables = [f"link add port{h.index} type veth peer name {CARD} netns {h.init}" for h in self._hosts]
        plugs = [f"link set port{h.index} master lan up" for h in self._hosts]
        lan.ip("link add lan type bridge", "link set lan up", *cables, *plugs)
        for host in self._hosts:
            lines = ("link set lo up", f"addr add {host.address}/24 dev {CARD}", f"link set {CARD} up")
            _batch("ip", host.init, *lines)

    def _hold(self, command: list[str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        holder = subprocess.Popen([*DIES_WITH_US, *command], stdin=pipe, stdout=pipe, stderr=pipe)
        self._holders.append(holder)
        return holder

    def close(self) -> None:
        """End the hosts with every process on them."""
        for holder in self._holders:
            assert holder.stdin
            holder.stdin.close()
        for holder in self._holders:
            holder.wait()
            for stream in (holder.stdout, holder.stderr):
                assert stream
                stream.close()
        self._holders.clear()


def _started(holder: subprocess.Popen[bytes], name: str) -> int:
    """The process that holds the namespace: it prints its number once it is set up."""
    assert holder.stdout and holder.stderr
    number = int(holder.stdout.readline() or 0)
    assert number, f"{name} did not start: {holder.stderr.read().decode()}"
    assert Path(f"/proc/{number}").exists()
    return number


def _batch(tool: str, namespace: int, *lines: str) -> None:
    """`ip` or `tc` in the network namespace of a process."""
    command = ["nsenter", "--target", str(namespace), "--net", "--", tool, "-batch", "-"]
    subprocess.run(command, input="\n".join(lines), text=True, check=True)
