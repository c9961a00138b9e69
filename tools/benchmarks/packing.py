"""`bench.py packing`: the plan of one optimizer update (see tools/bench.py)."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from typing import Any

from megatron_dapo.batching.packing import Cost, plan
from megatron_dapo.config import Fp8Config
from megatron_dapo.layout import Layout, round_up
from megatron_dapo.policy.fp8_rules import token_multiple

SIZES_32B = {"num_layers": 64, "hidden_size": 5120, "num_heads": 40, "num_kv_heads": 8, "head_dim": 128}
QWEN32B = Cost.of_model(**SIZES_32B, ffn_size=27648, vocab_size=152064)


def run(options: argparse.Namespace) -> dict[str, Any]:
    lengths = json.loads(options.lengths.read_text())
    if (longest := max(lengths)) > options.budget:
        raise SystemExit(
            f"error: --budget {options.budget} is below the longest sample ({longest} tokens); raise it"
        )
    layout = Layout(tp=options.tp, sp=options.tp > 1, cp=options.cp)
    began = time.perf_counter()
    padded = [round_up(length, layout.sequence_multiple) for length in lengths]
    ranks = plan(padded, dp=options.ranks, max_tokens=options.budget, cost=QWEN32B)
    seconds = time.perf_counter() - began
    costs = [sum(QWEN32B(lengths[i]) for micro in rank for i in micro) for rank in ranks]
    num_micro_batches = sum(len(rank) for rank in ranks)
    fp8 = Fp8Config(recipe=options.fp8) if options.fp8 else None
    unit = math.lcm(layout.sequence_multiple, layout.cp * token_multiple(fp8, layout))
    processed = sum(round_up(sum(padded[i] for i in micro), unit) for rank in ranks for micro in rank)
    return {
        "imbalance": round(max(costs) / statistics.fmean(costs), 5),
        "fill": round(sum(lengths) / (num_micro_batches * options.budget), 5),
        "num_micro_batches": num_micro_batches,
        "padding": round(1 - sum(lengths) / processed, 5),
        "lower_bound": options.ranks * math.ceil(sum(lengths) / (options.budget * options.ranks)),
        "seconds": round(seconds, 6),
    }
