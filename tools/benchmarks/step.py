"""`bench.py step`: whole training steps (see tools/bench.py)."""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import runs, updates
from benchmarks.resources import product_ceiling
from benchmarks.runs import WARM_UP, Line, make_model, median, medians, run_config, write_problems
from megatron_dapo.config import RunConfig
from megatron_dapo.report.rollouts import load_groups, rollout_path
from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.rollout.server import make_server
from megatron_dapo.types import Group

GEOMETRIC_VOCABULARY, GEOMETRIC_CAP = 160, 512  # tokens


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.lengths == "geometric" and options.max_age is not None:
        raise SystemExit("error: --max-age compares steps of equal lengths; leave --lengths out")
    with tempfile.TemporaryDirectory(prefix="megatron_dapo_bench_") as scratch:
        folder = Path(scratch)
        write_problems(folder / "data.jsonl")
        if options.lengths == "geometric":
            return geometric(folder, options.steps, options.overrides)
        make_model(folder / "model")
        strict = _steps(folder, 0, options)
        if options.max_age is None:
            return strict
        aged = _steps(folder, options.max_age, options)
        ratio = round(aged["time/step"] / strict["time/step"], 4)
        return {"strict": strict, "aged": aged, "max_age": options.max_age, "aged_over_strict": ratio}


def _steps(folder: Path, max_age: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of a run of responses of equal lengths."""
    settings = {"run.max_steps": options.steps + WARM_UP, "sampling.max_age": max_age}
    config = run_config(
        folder, model="model", name=f"run_{max_age}", settings=settings, overrides=options.overrides
    )
    return _report(runs.run(config))


def _report(lines: Sequence[Line]) -> dict[str, Any]:
    return {
        **medians(lines),
        "tokens_per_step": statistics.median(line["tokens/generated"] for line in lines),
        "steps": len(lines),
        "cores": os.cpu_count(),
    }


def geometric(folder: Path, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Long-tailed responses: the run's steps, and a padded, batch-synchronous step of the same engine and
    policy on responses of the same lengths.
    """
    parameters = make_model(folder / "model", tokens=GEOMETRIC_VOCABULARY, ends=True)
    make_model(folder / "endless", tokens=GEOMETRIC_VOCABULARY)
    settings = {
        "run.max_steps": steps + WARM_UP,
        "rollout.max_tokens": GEOMETRIC_CAP,
        "rollout.engines": 2,
        "report.rollouts": "true",
    }
    config = run_config(folder, model="model", name="run", settings=settings, overrides=overrides)
    lines = runs.run(config)
    step = steps + WARM_UP
    groups, _ = load_groups(rollout_path(config.run.dir, step))
    trained = updates.measure(config, step)
    endless = run_config(folder, model="endless", name="padded", settings=settings, overrides=overrides)
    generate = asyncio.run(_generate_padded(endless, groups))
    prompts = sum(len(group.prompt.tokens) * len(group.completions) for group in groups)
    responses = [len(completion.tokens) for group in groups for completion in group.completions]
    generated = statistics.median(line["tokens/generated"] for line in lines)
    ceiling = product_ceiling()
    padded_step = round(generate["seconds"] + trained["padded"] + median(lines, "time/sync"), 4)
    return {
        **_report(lines),
        "rollout_tokens_per_second": round(generated / median(lines, "time/rollout"), 1),
        "padded": {
            "step": padded_step,
            "generate": round(generate["seconds"], 4),
            "update": trained["padded"],
            "generated_tokens": generate["tokens"],
            "trained_tokens": trained["padded_tokens"],
        },
        "padded_over_step": round(padded_step / median(lines, "time/step"), 3),
        "update_alone": trained["packed"],
        "products": {
            "rollout": round(2 * parameters * (generated + prompts) / ceiling, 3),
            "update": round(6 * parameters * (generated + prompts) / ceiling, 3),
            "ceiling_gflops": round(ceiling / 1e9, 1),
            "parameters": parameters,
        },
        "mean_length": round(statistics.fmean(responses), 1),
        "longest": max(responses),
        "trained_tokens": sum(responses) + prompts,
    }


async def _generate_padded(config: RunConfig, groups: Sequence[Group]) -> dict[str, float]:
    """Seconds and tokens of generation in fixed batches of rollout.max_concurrency sequences an engine: every
    sequence of a batch goes on until the longest has ended, and the next batch waits for it.

    The model of `config` has no end of sequence, so a request for N tokens gives N.
    """
    model = Path(config.model.path or "")
    numbers = range(config.rollout.engines)
    servers = [make_server(config, n, model, "padded", digests="", load_format="auto") for n in numbers]
    clients: list[EngineClient] = []
    try:
        for server in servers:
            server.start()
        for server in servers:
            await server.wait_healthy(config.rollout.start_timeout_s)
            clients.append(
                EngineClient(server.url, "padded", progress_timeout_s=config.rollout.progress_timeout_s)
            )
        await asyncio.gather(*(_generate(client, groups[:1], 8) for client in clients))
        an_engine = max(1, config.rollout.max_concurrency // config.sampling.samples_per_prompt)
        size = an_engine * len(clients)
        began, tokens = time.perf_counter(), 0
        for start in range(0, len(groups), size):
            batch = groups[start : start + size]
            longest = max(len(completion.tokens) for group in batch for completion in group.completions)
            tokens += sum(
                await asyncio.gather(
                    *(
                        _generate(client, batch[n :: len(clients)], longest)
                        for n, client in enumerate(clients)
                    )
                )
            )
        return {"seconds": time.perf_counter() - began, "tokens": tokens}
    finally:
        for client in clients:
            await client.close()
        for server in servers:
            server.stop()


async def _generate(client: EngineClient, groups: Sequence[Group], tokens: int) -> int:
    """As many responses of `tokens` tokens as each group has; the tokens of all."""
    answers = await asyncio.gather(
        *(
            client.generate(
                group.prompt.tokens,
                n=len(group.completions),
                max_tokens=tokens,
                temperature=1.0,
                weight_version=0,
            )
            for group in groups
        )
    )
    return sum(len(completion.tokens) for answer in answers for completion in answer)
