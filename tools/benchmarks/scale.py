"""The controller at the flagship's size: receiving from simulated servers, collecting, holding and saving."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import resources
from benchmarks.runs import find_verifier, make_model, run_config, write_problems
from megatron_dapo.config import RunConfig, SamplingConfig
from megatron_dapo.report.rollouts import save_groups
from megatron_dapo.reward.grading import Grader
from megatron_dapo.rollout.answer import Responses
from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.rollout.collect import Collector
from megatron_dapo.rollout.fleet import Fleet
from megatron_dapo.rollout.replica import Replica
from megatron_dapo.rollout.rollouts import Rollouts
from megatron_dapo.rollout.wire import EndFrame, FrameDecoder, TokensFrame, encode
from megatron_dapo.types import Collected, Completion, Group, Partial, Prompt

LOOP_BUDGET_US, COLLECTOR_BUDGET_S, MEMORY_BUDGET, FILE_BUDGET = 0.5, 2.0, 12.0, 6.0
WANTED = 512  # informative groups of a step
LENGTH, ENGINES = 5000, 32
VOCABULARY, CERTAIN = 152_064, 0.6  # of the saved tokens: how many there are, share with log-probability 0
PROMPT_TOKENS = tuple(range(5, 205))


# --- receiving


def event_loop(tokens: int, samples: int) -> dict[str, Any]:
    """One step of about `tokens` tokens from simulated servers, with everything of rank 0 but the policy."""
    prompts = max(1, tokens // (samples * LENGTH))
    find_verifier()
    with tempfile.TemporaryDirectory(prefix="megatron_dapo_bench_") as scratch:
        folder = Path(scratch)
        make_model(folder / "model", longest=len(PROMPT_TOKENS) + LENGTH)
        write_problems(folder / "data.jsonl")
        settings = {
            "rollout.max_tokens": LENGTH,
            "sampling.prompts_per_step": prompts,
            "sampling.samples_per_prompt": samples,
        }
        config = run_config(folder, model="model", name="run", settings=settings, overrides=())
        command = [sys.executable, "-m", "benchmarks.answering", str(ENGINES), str(LENGTH), "100"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as servers:
            try:
                assert servers.stdout is not None
                ports = list(map(int, servers.stdout.readline().split()))
                return asyncio.run(_receive(config, folder / "model", ports))
            finally:
                servers.kill()


async def _receive(config: RunConfig, model: Path, ports: Sequence[int]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    grader = Grader(config.reward, AutoTokenizer.from_pretrained(model), longest=LENGTH)
    replicas = [Replica(name=f"engine_{port}", server=_Server(port)) for port in ports]
    fleet = Fleet(config.rollout, replicas, lambda server: EngineClient(server.url, "bench"), message=print)
    rollouts = Rollouts(config, fleet=fleet, prompts=_Stream(), grading=grader)
    await rollouts.start()
    await rollouts.wait_ready()
    for replica in replicas:
        fleet.set_ready(replica.name, 0)
    try:
        began, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
        collected: Collected = await rollouts.next_step(0)
        wall, thread, process = (
            time.perf_counter() - began,
            time.thread_time() - thread,
            time.process_time() - process,
        )
    finally:
        await rollouts.stop()
        grader.close()
    count = sum(len(c.tokens) for group in collected.groups for c in group.completions)
    return {
        "us_per_token": {"value": round(thread * 1e6 / count, 4), "budget": LOOP_BUDGET_US},
        "process_us_per_token": round(process * 1e6 / count, 4),
        "tokens": count,
        "tokens_per_second": round(count / wall),
        "engines": len(ports),
    }


class _Server:
    """One port of the answering process, as the fleet sees it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def start(self) -> None: ...

    def poll(self) -> int | None: ...

    async def wait_healthy(self, timeout: float) -> None: ...

    def stop(self) -> None: ...

    def log_tail(self) -> str:
        return ""


class _Stream:
    """Prompts without end."""

    def __init__(self) -> None:
        self._position = -1

    def next(self) -> Prompt:
        self._position += 1
        position = self._position
        return Prompt(position=position, row=position, text="?", answer="1", tokens=PROMPT_TOKENS)

    def record(self, prompt: Prompt, accuracy: float) -> None: ...

    def state(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state(self, state: dict[str, Any]) -> None:
        self._position = state["position"]


# --- collecting


def collector(prompts: int) -> dict[str, Any]:
    """One strict step of `prompts` prompts, of which one in 30 is informative, ended in random order."""
    wanted = max(1, min(WANTED, prompts // 30))
    seconds, collected = asyncio.run(_collect(prompts, wanted))
    return {
        "seconds": {"value": round(seconds, 3), "budget": COLLECTOR_BUDGET_S},
        "prompts": collected.counts["groups_sampled"],
        "groups": len(collected.groups),
    }


async def _collect(prompts: int, wanted: int) -> tuple[float, Collected]:
    chance = random.Random(0)
    waiting: list[asyncio.Future[None]] = []

    async def sample(prompt: Prompt, began: Sequence[Partial]) -> Group:
        waiting.append(asyncio.get_running_loop().create_future())
        await waiting[-1]
        informative = prompt.position % 30 == 29
        return Group(
            prompt=prompt,
            completions=(completion, completion),
            correct=(informative, False),
            rewards=(1.0, -1.0),
        )

    completion = make_completion(np.ones(1, np.int32), np.zeros(1, np.float32), 0)
    config = SamplingConfig(
        prompts_per_step=wanted,
        samples_per_prompt=2,
        max_age=0,
        max_prompts=prompts,
        on_cap="train_smaller_batch",
    )
    step = asyncio.ensure_future(Collector(prompts=_Stream(), sample=sample, config=config).collect(0))
    began = time.process_time()
    while not step.done():
        await asyncio.sleep(0)
        if waiting:
            last = chance.randrange(len(waiting))
            waiting[last], waiting[-1] = waiting[-1], waiting[last]
            ended = waiting.pop()
            if not ended.cancelled():
                ended.set_result(None)
    return time.process_time() - began, step.result()


# --- holding


def memory(tokens: int, samples: int) -> dict[str, Any]:
    """Groups as they come from the wire, about `tokens` tokens of them or what half the free memory holds."""
    fits = int(psutil.virtual_memory().available / 2 / MEMORY_BUDGET)
    groups = max(1, min(tokens, fits) // (samples * LENGTH))
    chance = np.random.default_rng(0)
    ids = chance.integers(0, VOCABULARY, LENGTH, dtype=np.int32)
    logprobs = -chance.exponential(1.0, LENGTH).astype(np.float32)
    frames = [
        encode(TokensFrame(index=i, finish_reason="stop", tokens=ids, logprobs=logprobs))
        for i in range(samples)
    ]
    stream, answer = _Stream(), b"".join([*frames, encode(EndFrame(count=samples))])
    before = _resident()
    held = [_group(stream.next(), _received(answer, samples)) for _ in range(groups)]
    count = sum(len(completion.tokens) for group in held for completion in group.completions)
    value = (_resident() - before) / count
    return {
        "bytes_per_token": {"value": round(value, 3), "budget": MEMORY_BUDGET},
        "tokens": count,
        "scaled_down": fits < tokens,
    }


def _resident() -> int:
    """Bytes in use, once what is free has gone back to the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resources.memory("VmRSS")


def _received(answer: bytes, samples: int) -> list[Completion]:
    responses = Responses(
        samples, began=(), max_tokens=LENGTH, seed=None, weight_version=0, url="", arrived=None
    )
    for frame in FrameDecoder().feed(answer):
        if isinstance(frame, TokensFrame):
            responses.add(frame)
    return responses.whole()


def _group(prompt: Prompt, completions: Sequence[Completion]) -> Group:
    correct = tuple(completion.number % 2 == 0 for completion in completions)
    rewards = tuple(1.0 if right else -1.0 for right in correct)
    return Group(prompt=prompt, completions=tuple(completions), correct=correct, rewards=rewards)


# --- saving


def rollout_file(tokens: int, samples: int) -> dict[str, Any]:
    """A file of about `tokens` tokens."""
    certain = _save(tokens, samples, CERTAIN)
    differ = _save(tokens, samples, 0.0)
    return {
        "bytes_per_token": {
            "value": certain["bytes"],
            "budget": FILE_BUDGET,
            "all_differ": differ["bytes"],
        },
        "seconds_per_million_tokens": certain["seconds"],
        "tokens": certain["tokens"],
    }


def _save(tokens: int, samples: int, certain: float) -> dict[str, float]:
    chance, stream = np.random.default_rng(0), _Stream()
    groups = [
        _group(stream.next(), [_written(chance, number, certain) for number in range(samples)])
        for _ in range(max(1, tokens // (samples * LENGTH)))
    ]
    count = len(groups) * samples * LENGTH
    with tempfile.TemporaryDirectory(prefix="megatron_dapo_bench_") as folder:
        path, began = Path(folder) / "step.parquet", time.perf_counter()
        save_groups(path, groups, 1, {})
        seconds = time.perf_counter() - began
        return {
            "bytes": round(path.stat().st_size / count, 3),
            "seconds": round(seconds * 1e6 / count, 4),
            "tokens": count,
        }


def _written(chance: np.random.Generator, number: int, certain: float) -> Completion:
    tokens = (chance.zipf(1.2, LENGTH) % VOCABULARY).astype(np.int32)
    logprobs = -chance.exponential(1.0, LENGTH).astype(np.float32)
    return make_completion(tokens, np.where(chance.random(LENGTH) < certain, np.float32(0), logprobs), number)


def make_completion(tokens: np.ndarray, logprobs: np.ndarray, number: int) -> Completion:
    return Completion(
        tokens=tokens,
        logprobs=logprobs,
        trained=np.broadcast_to(np.True_, len(tokens)),
        finish_reason="stop",
        versions=((0, len(tokens)),),
        number=number,
    )
