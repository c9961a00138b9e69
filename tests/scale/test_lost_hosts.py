"""A host that falls silent, with the clocks of a real run: who waits for it notices within half a minute, and
a short cut harms nobody.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from support.hosts import Host, Hosts, reason_against

pytestmark = pytest.mark.skipif(reason_against() is not None, reason=reason_against() or "")

LIFELINE = """
import sys, time
from megatron_dapo.lifeline import Lifeline
def report(loss):
    print(loss.told, loss.reason, flush=True)
rank = int(sys.argv[1])
if rank == 0:
    lifeline = Lifeline.serve("token", ["rank 1", "rank 2"], report)
    print(lifeline.port, flush=True)
else:
    lifeline = Lifeline.join(("host0", int(sys.argv[2])), "token", f"rank {rank}", report)
    print("joined", flush=True)
time.sleep(600)
"""
SERVER = """
import asyncio
from aiohttp import web
async def generate(request):
    print("asked", flush=True)
    await asyncio.sleep(600)
app = web.Application()
app.router.add_post("/megatron_dapo/v1/generate", generate)
web.run_app(app, port=8000, print=None)
"""
CLIENT = """
import asyncio
from megatron_dapo.rollout.connection import GENERATE_PATH, Connection
async def ask():
    connection = Connection("http://host1:8000", "token")
    while True:
        try:
            return await connection.call("POST", GENERATE_PATH, {}, timeout_s=None)
        except Exception as error:
            if "Cannot connect" not in str(error):
                return print(error, flush=True)
            await asyncio.sleep(0.2)
asyncio.run(ask())
"""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts(3) as three:
        yield three


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def on(host: Host, code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        processes.append(host.popen(command, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield on
    for process in processes:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    """Its next line; waits for it."""
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.mark.timeout(180)
def test_a_silent_host_is_noticed_by_all_and_a_short_cut_by_nobody(hosts, start):
    server, client = start(hosts[1], SERVER), start(hosts[0], CLIENT)
    hub = start(hosts[0], LIFELINE, 0)
    port = said(hub)
    others = [start(hosts[rank], LIFELINE, rank, port) for rank in (1, 2)]
    assert [said(process) for process in others] == ["joined", "joined"]
    assert said(server) == "asked"

    hosts[1].cut()
    hosts[2].cut()
    began = time.monotonic()
    time.sleep(8)
    hosts[2].mend()

    told, sentence = said(hub).split(" ", 1)
    assert told == "False" and sentence.startswith("rank 1 on host1 ")
    # TCP's own time-out and the silence that we count are equally long
    assert "has given no sign of life for 20 s" in sentence or "is gone (Connection timed out)" in sentence
    assert said(others[1]) == f"True {sentence}"  # over the cut that was mended
    assert said(others[0]).startswith("False rank 0 on host0 ")  # it cannot be told
    assert 15 < time.monotonic() - began < 30
    assert said(client).startswith("the engine at http://host1:8000 is gone (/megatron_dapo/v1/generate: ")
    assert time.monotonic() - began < 40
