"""After every weight push an engine holds, in every bit, what a fresh one loads from the policy's export:
policies in every kind of layout, every family of models, engines of one and of two tensor-parallel workers.

Most pushes go into workers that hold weights and serve nothing, whose kernels' products are compared, too; a
covering part goes into vLLM servers, which are then asked for tokens.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from support.cases import LAYOUTS
from support.jobs_grid import NUM_UPDATES, Case
from support.models import TOKEN, make_tiny_model
from support.ranks import run_ranks
from support.servers import running

from megatron_dapo.config import RolloutConfig
from megatron_dapo.environment import DIGEST_VARIABLE
from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.rollout.server import EngineServer
from megatron_dapo.types import Completion

pytestmark = pytest.mark.timeout(3600)
DENSE = ("tp1", "tp2", "pp2", "tp2_pp2", "pp2_vpp2", "dp2", "cp2")
EXPERTS = ("tp1", "tp2_sp", "pp2", "tp2_sp_pp2", "tp2_sp_pp2_vpp2", "dp2", "cp2", "ep2", "tp2_sp_ep2_pp2")
FAMILIES: dict[str, tuple[str, ...]] = {
    "qwen2": DENSE,
    "qwen3": DENSE,
    "llama": DENSE,
    "mistral": DENSE,
    "qwen3_moe": EXPERTS,
}
PROMPTS = [[10, 20, 30, 40], [7], [50, 40, 30, 20, 10, 9, 8]]


def make_case(folder: Path, arch: Any, tied: bool, layouts: tuple[str, ...] = ()) -> Case:
    model = make_tiny_model(
        folder / f"{arch}-{tied}", arch=arch, tied=tied, layers=4, ffn=64, max_positions=256
    )
    return Case(model=str(model), layouts=layouts or FAMILIES[arch])


def assert_equal(found: dict[str, Any], case: Case, workers: set[str]) -> None:
    """All pushes of a case were bit-equal, and each of them changed every parameter."""
    assert set(found) == set(case.layouts)
    for layout, by_worker in found.items():
        assert set(by_worker) == workers
        for worker, results in by_worker.items():
            assert len(results) == NUM_UPDATES
            for update, result in enumerate(results):
                where = f"{layout}, {worker}, update {update}"
                assert result["parameters"] > 20
                assert not result["wrong"] + result["computed"] + result["unchanged"], where


def push_to_receivers(folder: Path, cases: dict[str, Case], sizes: tuple[int, ...]) -> None:
    job = "support.jobs_grid:push_to_receivers"
    world = max(LAYOUTS[layout].world_size for case in cases.values() for layout in case.layouts)
    [found, *_] = run_ranks(job, world, cases=cases, engine_sizes=sizes, folder=str(folder), timeout_s=1800)
    for name, case in cases.items():
        assert_equal(found[name], case, {f"tp{tp} rank {rank}" for tp in sizes for rank in range(tp)})


def test_pushes_are_what_a_fresh_engine_loads(tmp_path):
    """A part of the next test, for every day."""
    push_to_receivers(tmp_path, {"tied": make_case(tmp_path, "qwen2", True, ("pp2_vpp2", "dp2"))}, (2,))


@pytest.mark.slow
@pytest.mark.parametrize("arch", FAMILIES)
def test_every_layout_pushes_what_a_fresh_engine_loads(tmp_path, arch):
    cases = {name: make_case(tmp_path, arch, name == "tied") for name in ("tied", "untied")}
    push_to_receivers(tmp_path, cases, (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "tied", "tp", "layouts"),
    [
        ("qwen2", True, 1, DENSE),
        ("qwen2", False, 2, DENSE),
        ("qwen3", True, 2, ("tp2_pp2",)),
        ("llama", False, 2, ("pp2_vpp2",)),
        ("mistral", True, 1, ("cp2",)),
        ("qwen3_moe", False, 1, EXPERTS),
        ("qwen3_moe", True, 2, ("ep2", "tp2_sp_ep2_pp2")),
    ],
)
def test_a_server_computes_as_a_fresh_one(tmp_path, arch, tied, tp, layouts):
    """A server takes all pushes; after the last one it answers in every bit as one that loads the export."""
    case = make_case(tmp_path, arch, tied, layouts)
    with started(tmp_path, Path(case.model), tp, "pushed") as server:
        [found, *_] = run_ranks(
            "support.jobs_grid:push_to_server",
            4,
            case=case,
            tp=tp,
            url=server.url,
            token=TOKEN,
            digests=str(tmp_path / "pushed"),
            folder=str(tmp_path),
            timeout_s=1800,
        )
        version = NUM_UPDATES * len(layouts)
        answers = asyncio.run(generate(server, version))
    assert_equal(found, case, {f"rank {rank}" for rank in range(tp)})
    with started(tmp_path, tmp_path / "export", tp, "fresh") as server:
        fresh = asyncio.run(generate(server, version))
    for rank in range(tp):
        held = [tmp_path / "pushed" / f"tp{rank}-v{version}.json", tmp_path / "fresh" / f"tp{rank}-load.json"]
        assert json.loads(held[0].read_text()) == json.loads(held[1].read_text())
    for one, other in zip(answers, fresh, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()
    assert len({answer.logprobs.tobytes() for answer in answers}) == len(PROMPTS)
    assert sum(len(answer.tokens) for answer in answers) > 32


def started(folder: Path, model: Path, tp: int, name: str) -> AbstractContextManager[EngineServer]:
    """A server of the checkpoint that writes digests into `folder`/`name`."""
    rollout = RolloutConfig(max_concurrency=8, tensor_parallel=tp)
    digests = {DIGEST_VARIABLE: str(folder / name)}
    server = EngineServer(0, str(model), rollout, "fp32", 128, folder / f"{name}_run", TOKEN, 0, digests)
    return running(server, 400)


async def generate(server: EngineServer, version: int) -> list[Completion]:
    """Greedy answers to all prompts, one after the other."""
    client = EngineClient(server.url, TOKEN)
    try:
        return [
            (await client.generate(prompt, n=1, max_tokens=32, temperature=0.0, weight_version=version))[0]
            for prompt in PROMPTS
        ]
    finally:
        await client.close()
