#!/usr/bin/env python
"""Benchmarks that print JSON.

    python tools/bench.py step [--steps 8] [section.key=value ...]
    python tools/bench.py packing --lengths lengths.json [--budget 22528] [--ranks 128] [--tp 8] [--cp 2]
                                  [--fp8 blockwise]
    python tools/bench.py train-step --model FOLDER --lengths lengths.json [--tokens 16384] [--budget 4096]
                                     [section.key=value ...]
    python tools/bench.py logprob [--tokens 4096] [--vocab 151936] [--hidden 1024] [--repeats 3]

`step`: whole training steps (collect, grade, update, sync) of a 3M-parameter model with random weights: 32
prompts x 8 samples of 20 tokens, 2 data-parallel ranks, one vLLM server. Seconds are medians over the steps
after the first two.

`packing`: plans one optimizer update on samples of the given lengths (a JSON list, tokens) with the cost of
Qwen2.5-32B. imbalance: cost of the costliest rank over the mean one; fill: tokens over the budgets of all
micro-batches; lower_bound: micro-batches if the budgets of every rank could be filled to the last token,
which few lengths allow; padding: share of the processed tokens that the layout adds; seconds: planning only.

`logprob`: forward and backward of batching/logprobs.py beside `log_softmax` of all the logits, in fp32 on the
CPU. Peak bytes are resident memory over what there was before, in forward or backward, without the inputs'
gradients, which the caller keeps. `max_grad_error` is the largest difference of a gradient's elements over
the largest element. The plain version needs 2.5 times `tokens x vocab x 4` bytes. Medians over the repeats.

`train-step`: optimizer updates of one rank on the CPU in fp32, on samples of the given lengths (a JSON list,
tokens): packed end to end, and, for comparison in the same run, padded to the longest of each micro-batch.
Tokens a second count real tokens. gemm_share: matrix products in the CPU time of a packed update;
gemm_of_ceiling: their operations a second over the whole update, against a large product on the same machine;
peak_extra_bytes: resident memory of an update over what there was before. Medians over the repeats.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_dapo import preflight
from megatron_dapo.batching.logprobs import logprobs_from_hidden
from megatron_dapo.batching.packing import Cost, pack, plan
from megatron_dapo.config import Fp8Config, RunConfig
from megatron_dapo.layout import Layout, round_up
from megatron_dapo.objectives.base import trained_tokens
from megatron_dapo.policy.fp8_rules import token_multiple
from megatron_dapo.train import launch
from megatron_dapo.types import Batch, Sample

SIZES_32B = {"num_layers": 64, "hidden_size": 5120, "num_heads": 40, "num_kv_heads": 8, "head_dim": 128}
QWEN32B = Cost.of_model(**SIZES_32B, ffn_size=27648, vocab_size=152064)
WARM_UP = 2  # first steps: caches, lazily built kernels


def even_length(response: str, answer: str) -> bool:
    """A verifier that random weights satisfy about half the time."""
    return sum(map(ord, response)) % 2 == 0


def step(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="megatron_dapo_bench_") as scratch:
        folder = Path(scratch)
        make_model(folder / "model")
        rows = [
            {"prompt": f"What is {a}+{b}?\n", "answer": str(a + b)}
            for a in range(10, 99)
            for b in range(10, 99)
        ]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        )
        settings = {
            "model.path": folder / "model",
            "model.dtype": "fp32",
            "layout.data_parallel": 2,
            "rollout.max_tokens": 20,
            "sampling.prompts_per_step": 32,
            "sampling.samples_per_prompt": 8,
            "sampling.dynamic": "false",
            "reward.verifier": "bench:even_length",
            "data.path": folder / "data.jsonl",
            "data.max_prompt_tokens": 32,
            "batch.max_tokens": 4096,
            "checkpoint.export_hf": "false",
            "run.dir": folder / "run",
            "run.max_steps": options.steps + WARM_UP,
        }
        config = RunConfig.load(
            None, [f"{key}={value}" for key, value in settings.items()] + options.overrides
        )
        with open(os.devnull, "w") as quiet:
            stdout = os.dup(1)
            os.dup2(quiet.fileno(), 1)  # the run's own lines; stdout carries the JSON only
            try:
                status = launch(config)
            finally:
                os.dup2(stdout, 1)
        if status != 0:
            raise SystemExit(status)
        lines = [
            json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
        ]
    measured = [line for line in lines if line["step"] > WARM_UP]
    medians = {
        key: round(statistics.median(line[key] for line in measured), 4)
        for key in measured[0]
        if key.startswith("time/")
    }
    return {
        **medians,
        "tokens_per_step": statistics.median(line["tokens/generated"] for line in measured),
        "steps": len(measured),
        "cores": os.cpu_count(),
    }


def packing(options: argparse.Namespace) -> dict[str, Any]:
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


def make_model(folder: Path) -> None:
    """The model of examples/make_tiny_base.py with random weights, and no end of sequence: every response has
    its full length.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import make_tiny_base  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    tokenizer = make_tiny_base.make_tokenizer()
    model = make_tiny_base.make_model(tokenizer)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def logprob(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden_RH = torch.randn(options.tokens, options.hidden, requires_grad=True)
    weight_VH = torch.randn(options.vocab, options.hidden).mul_(options.hidden**-0.5).requires_grad_()
    labels_R, arriving_R = torch.randint(options.vocab, (options.tokens,)), torch.randn(options.tokens)

    def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)

    def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logprobs_from_hidden(hidden, weight, labels, vocab_size=options.vocab)[0]

    def measure(function: Callable[..., torch.Tensor]) -> tuple[float, int, tuple[torch.Tensor, ...]]:
        """Seconds, peak bytes, the two gradients."""
        few = [x.detach()[:4].requires_grad_() for x in (hidden_RH, weight_VH)]
        function(*few, labels_R[:4] % 4).sum().backward()  # libraries start up
        before, start = _reset_peak(), time.perf_counter()
        logprobs_R = function(hidden_RH, weight_VH, labels_R)
        peak, middle = _memory("VmHWM"), time.perf_counter()
        _reset_peak()
        between = time.perf_counter()
        gradients = torch.autograd.grad((logprobs_R * arriving_R).sum(), (hidden_RH, weight_VH))
        seconds = time.perf_counter() - between + middle - start
        return seconds, max(peak, _memory("VmHWM") - sum(g.nbytes for g in gradients)) - before, gradients

    by_repeat: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        seconds, peak, gradients = measure(ours)
        plain_seconds, plain_peak, plain_gradients = measure(plain)
        pairs = zip(gradients, plain_gradients, strict=True)
        error = max(float((g - p).abs().max() / p.abs().max()) for g, p in pairs)
        now = {
            "peak_extra_bytes": peak,
            "plain_peak_extra_bytes": plain_peak,
            "seconds": seconds,
            "plain_seconds": plain_seconds,
        }
        for key, value in {**now, "max_grad_error": error}.items():
            by_repeat.setdefault(key, []).append(value)
        del gradients, plain_gradients, pairs
    return {key: statistics.median(values) for key, values in by_repeat.items()}


def train_step(options: argparse.Namespace) -> dict[str, Any]:
    lengths: list[int] = []
    for length in json.loads(options.lengths.read_text()):
        if sum(lengths) + length > options.tokens:
            break
        lengths.append(length)
    config = RunConfig.load(
        None,
        [
            f"model.path={options.model}",
            "model.dtype=fp32",
            "run.device=cpu",
            f"batch.max_tokens={options.budget}",
        ]
        + ["data.max_prompt_tokens=1", "rollout.max_tokens=1", *options.overrides],
    )
    policy, chance = _one_rank_policy(config), random.Random(0)
    packed = pack(
        [_sample(length, length, chance) for length in lengths],
        dp=1,
        num_updates=1,
        max_tokens=options.budget,
        version=0,
        denominator=trained_tokens,
    )
    padded = _padded_batch(lengths, options.budget, chance)
    seconds: dict[str, list[float]] = {"packed": [], "padded": []}
    for repeat in range(options.repeats + 1):
        for name, batch in (("packed", packed), ("padded", padded)):
            began = time.perf_counter()
            policy.update(batch, 0)
            if repeat > 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    before = _reset_peak()
    policy.update(packed, 0)
    peak = _memory("VmHWM") - before
    with torch.profiler.profile(with_flops=True) as profile:
        policy.update(packed, 0)
    events = profile.key_averages()
    products = [event for event in events if event.key in ("aten::mm", "aten::addmm", "aten::bmm")]
    spent = statistics.median(seconds["packed"])
    (micro_batches,) = packed.mini_batches[0].micro_batches
    unit = token_multiple(config.policy.fp8, config.layout.to_layout())
    ceiling = _product_ceiling()
    return {
        "tokens_per_second": round(sum(lengths) / spent, 1),
        "padded_tokens_per_second": round(sum(lengths) / statistics.median(seconds["padded"]), 1),
        "packed_over_padded": round(statistics.median(seconds["padded"]) / spent, 3),
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


def _one_rank_policy(config: RunConfig) -> Any:
    import torch.distributed as dist

    from megatron_dapo.objectives import make_objective
    from megatron_dapo.policy import session as session_file
    from megatron_dapo.policy.backend import CPU
    from megatron_dapo.policy.step import Policy

    preflight.check_training(config)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    session = session_file.start(config.layout.to_layout(), CPU)
    return Policy(config, session, make_objective(config.objective))


def _sample(length: int, padded: int, chance: random.Random) -> Sample:
    """A quarter prompt, the rest response, then untrained padding."""
    prompt = max(1, length // 4)
    mask = torch.zeros(padded, dtype=torch.bool)
    mask[prompt:length] = True
    return Sample(
        tokens=torch.tensor([chance.randrange(3, 90) for _ in range(padded)], dtype=torch.int32),
        response_mask=mask,
        rollout_logprobs=torch.zeros(padded),
        advantages=torch.full((padded,), chance.gauss(0.0, 1.0)),
        prompt_position=0,
        number=0,
        weight_version=0,
    )


def _padded_batch(lengths: list[int], budget: int, chance: random.Random) -> Batch:
    """Micro-batches without packing: samples in their order, each padded to the longest of its micro-batch,
    within the budget.
    """
    micro_batches: list[list[int]] = [[]]
    for index in range(len(lengths)):
        members = [*micro_batches[-1], index]
        if micro_batches[-1] and len(members) * max(lengths[i] for i in members) > budget:
            micro_batches.append([])
        micro_batches[-1].append(index)
    longest = {i: max(lengths[j] for j in micro) for micro in micro_batches for i in micro}
    samples = [_sample(length, longest[i], chance) for i, length in enumerate(lengths)]
    batch = pack(
        samples,
        dp=1,
        num_updates=1,
        max_tokens=max(budget, *longest.values()),
        version=0,
        denominator=trained_tokens,
    )
    mini = dataclasses.replace(
        batch.mini_batches[0], micro_batches=(tuple(tuple(micro) for micro in micro_batches),)
    )
    return dataclasses.replace(batch, mini_batches=(mini,))


def _product_ceiling(size: int = 2048) -> float:
    """Floating-point operations a second of a large fp32 matrix product here, the best of five."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])


def _memory(key: str) -> int:
    """Bytes of `key` in Linux's /proc/self/status: VmRSS (resident now) or VmHWM (the most since the last
    reset).
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def _reset_peak() -> int:
    """VmHWM starts again from VmRSS, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    whole = commands.add_parser("step", help="whole training steps")
    whole.add_argument("--steps", type=int, default=8)
    whole.add_argument("overrides", nargs="*", metavar="section.key=value")
    whole.set_defaults(run=step)
    planning = commands.add_parser("packing", help="micro-batches for samples of given lengths")
    planning.add_argument("--lengths", type=Path, required=True, help="JSON list of sample lengths, tokens")
    planning.add_argument(
        "--budget", type=int, default=22528, help="tokens of one micro-batch (batch.max_tokens)"
    )
    planning.add_argument("--ranks", type=int, default=128, help="data-parallel ranks")
    planning.add_argument(
        "--tp", type=int, default=1, help="tensor (and sequence) parallel ranks, for the padding"
    )
    planning.add_argument("--cp", type=int, default=1, help="context-parallel ranks, for the padding")
    planning.add_argument(
        "--fp8", choices=["tensorwise", "delayed", "blockwise", "mxfp8"], help="recipe, for the padding"
    )
    planning.set_defaults(run=packing)
    part = commands.add_parser("logprob", help="log-probabilities from hidden states")
    for name, default in (("tokens", 4096), ("vocab", 151936), ("hidden", 1024), ("repeats", 3)):
        part.add_argument(f"--{name}", type=int, default=default)
    part.set_defaults(run=logprob)
    update = commands.add_parser("train-step", help="one optimizer update on one rank, packed and padded")
    update.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face checkpoint")
    update.add_argument("--lengths", type=Path, required=True, help="JSON list of sample lengths, tokens")
    update.add_argument("--tokens", type=int, default=16384, help="take lengths from the list up to this sum")
    update.add_argument(
        "--budget", type=int, default=4096, help="tokens of one micro-batch (batch.max_tokens)"
    )
    update.add_argument("--repeats", type=int, default=3)
    update.add_argument("overrides", nargs="*", metavar="section.key=value")
    update.set_defaults(run=train_step)
    options = parser.parse_args()
    print(json.dumps(options.run(options)))


if __name__ == "__main__":
    sys.exit(main())
