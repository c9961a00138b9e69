"""The interface that leads to an address, on this machine's loopback and between hosts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.hosts import CARD, Hosts, reason_against

SCRIPT = Path(__file__).parents[2] / "tools" / "network_interface.py"


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1", "MASTER_ADDR=127.0.0.1 is 127.0.0.1 here, which other hosts cannot reach"),
        ("no.such.invalid", "MASTER_ADDR=no.such.invalid: no route to it"),
    ],
)
def test_an_address_that_other_hosts_cannot_use_is_refused(host, words):
    found = subprocess.run([sys.executable, str(SCRIPT), host], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"error: {words}")


@pytest.mark.skipif(reason_against() is not None, reason=reason_against() or "")
def test_every_host_names_its_own_interface():
    """The host of the address itself too, where the route goes over the loopback."""
    with Hosts(2) as hosts:
        command = [sys.executable, str(SCRIPT), "host0"]
        running = [hosts[i].popen(command, stdout=subprocess.PIPE, text=True) for i in range(2)]
        assert [process.communicate(timeout=60)[0] for process in running] == [f"{CARD}\n"] * 2
