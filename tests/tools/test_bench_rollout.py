"""`tools/bench.py rollout`: each figure beside its budget, and that it counts what it says."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
from aiohttp import web
from support.http_server import metrics, serving

SMALL = ["--samples", "2", "--simulated-tokens", "20000", "--held-tokens", "3000000"]
SMALL += ["--saved-tokens", "40000", "--collector-prompts", "300"]


@pytest.fixture
def modules(bench):
    """The files of the benchmark, by name."""
    return SimpleNamespace(
        **{name: importlib.import_module(f"benchmarks.{name}") for name in ("scale", "wire")}
    )


def test_simulated_scale(bench, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")  # set by the benchmark for the processes that it starts
    report = bench("rollout", "--only", "scale", *SMALL)
    assert report.keys() == {"scale"}
    loop, collector, memory, file = (
        report["scale"][name] for name in ("event_loop", "collector", "memory", "rollout_file")
    )
    assert loop["us_per_token"]["budget"] == 0.5 and loop["us_per_token"]["value"] > 0
    assert loop["tokens"] == 20000 and loop["engines"] == 32
    assert collector["seconds"]["budget"] == 2.0 and collector["seconds"]["value"] > 0
    assert collector["prompts"] == 300 and collector["groups"] == 10  # one in 30
    assert memory["bytes_per_token"]["budget"] == 12.0 and memory["tokens"] == 3_000_000
    assert 7.5 <= memory["bytes_per_token"]["value"] < 9.0 and memory["scaled_down"] is False
    assert file["bytes_per_token"]["budget"] == 6.0 and file["tokens"] == 40000
    assert 1.0 < file["bytes_per_token"]["value"] < file["bytes_per_token"]["all_differ"] - 1.0


def test_memory_is_scaled_down_to_what_is_free(modules, monkeypatch):
    free = SimpleNamespace(available=2 * 12 * 250_000)  # half of it holds 250,000 tokens of 12 bytes
    monkeypatch.setattr(modules.scale.psutil, "virtual_memory", lambda: free)
    report = modules.scale.memory(1_000_000, 4)
    assert report["tokens"] == 240_000 and report["scaled_down"] is True


async def test_bytes_are_those_of_the_connection(modules):
    text = metrics(1) + "\n# and so on" * 3000

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=text)

    async with serving(metrics=answer) as client:
        await client.load()
        with modules.wire.received_bytes() as received:
            await client.load()
        await client.load()
    assert len(text) < received[0] < len(text) + 500  # and the headers


@pytest.mark.slow
def test_real_server(bench):
    report = bench("rollout", "--only", "wire", "--prompts", "2", "--samples", "2", "--tokens", "64")["wire"]
    assert report["tokens"] == 256
    api = report["api_process_us_per_token"]
    assert api["budget"] == 2.0 and api["value"] >= 0 and api["json"] > 0
    assert 8 < report["bytes_per_token"]["value"] < 20  # with the header of a response of 64 tokens
    assert report["bytes_per_token"]["json"] > 60
    assert report["engine_us_per_token"]["value"] > 0 and report["tokens_per_second"]["json"] > 0
