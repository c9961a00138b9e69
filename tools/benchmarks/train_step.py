"""`bench.py train-step`: optimizer updates of one rank, packed and padded (see tools/bench.py)."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import torch

from benchmarks.one_rank import one_rank_policy
from benchmarks.padding import make_sample, padded_batch
from benchmarks.resources import memory, product_ceiling, reset_peak
from megatron_dapo.batching.packing import pack
from megatron_dapo.layout import round_up
from megatron_dapo.objectives.base import trained_tokens
from megatron_dapo.policy.fp8_rules import token_multiple
from megatron_dapo.types import Batch


def run(options: argparse.Namespace) -> dict[str, Any]:
    lengths = _taken(json.loads(options.lengths.read_text()), options.tokens)
    policy = one_rank_policy(options.model, options.budget, options.overrides)
    config, chance = policy.config, random.Random(0)
    packed = pack(
        [make_sample(length, chance) for length in lengths],
        dp=1,
        num_updates=1,
        max_tokens=options.budget,
        version=0,
        denominator=trained_tokens,
    )
    padded = padded_batch(lengths, options.budget, chance)
    seconds = _times(policy, {"packed": packed, "padded": padded}, options.repeats)
    before = reset_peak()
    policy.update(packed, 0)
    peak = memory("VmHWM") - before
    with torch.profiler.profile(with_flops=True) as profile:
        policy.update(packed, 0)
    events = profile.key_averages()
    products = [event for event in events if event.key in ("aten::mm", "aten::addmm", "aten::bmm")]
    spent = seconds["packed"]
    (micro_batches,) = packed.mini_batches[0].micro_batches
    unit = token_multiple(config.policy.fp8, config.layout.to_layout())
    ceiling = product_ceiling()
    return {
        "tokens_per_second": round(sum(lengths) / spent, 1),
        "padded_tokens_per_second": round(sum(lengths) / seconds["padded"], 1),
        "packed_over_padded": round(seconds["padded"] / spent, 3),
        "gemm_share": round(
            sum(e.self_cpu_time_total for e in products) / sum(e.self_cpu_time_total for e in events), 3
        ),
        "gemm_of_ceiling": round(sum(e.flops for e in products) / spent / ceiling, 3),
        "ceiling_gflops": round(ceiling / 1e9, 1),
        "padding_share": round(
            1 - sum(lengths) / sum(round_up(sum(lengths[i] for i in m), unit) for m in micro_batches), 3
        ),
        "padded_padding_share": round(1 - sum(lengths) / sum(padded.lengths), 3),
        "peak_extra_bytes": peak,
        "samples": len(lengths),
        "micro_batches": len(micro_batches),
    }


def _taken(lengths: list[int], tokens: int) -> list[int]:
    """Lengths from the beginning of the list, up to a sum of `tokens`."""
    taken: list[int] = []
    for length in lengths:
        if sum(taken) + length > tokens:
            break
        taken.append(length)
    return taken


def _times(policy: Any, batches: dict[str, Batch], repeats: int) -> dict[str, float]:
    """Median seconds of an update on each batch, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for repeat in range(repeats + 1):
        for name, batch in batches.items():
            began = time.perf_counter()
            policy.update(batch, 0)
            if repeat > 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}
