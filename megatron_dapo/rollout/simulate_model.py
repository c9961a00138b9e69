"""The numbers a simulation stands on: how fast an engine decodes, what its memory holds, what training costs.

All of them are *planned*: computed from published hardware figures, not measured. A file given as
`--engine-speed` replaces any of them by what was measured.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError

TABLE_SIZES = (1, 8, 32, 64, 128, 256)  # running sequences that the speed table lists


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """params: of the whole model. kv_bytes: KV cache of one token. bytes_per_param: in the engine."""

    params: float
    kv_bytes: float
    bytes_per_param: float
    mean_context: float  # tokens before the one that is sampled, mean over all sampled tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One GPU, or this CPU. `*_used`: the share of the published figure that real kernels reach (planned).

    overhead_s: of one decoding step, whatever its size: scheduling, launches, all-reduces.
    """

    bytes_per_s: float
    bytes_used: float
    flops_per_s: float
    flops_used: float
    mfu: float  # in training
    memory_bytes: float
    reserved_bytes: float  # activations, graphs, communication buffers of an engine
    overhead_s: float
    start_s: float  # of an engine
    sync_s: float  # of one weight push


# H100 SXM5 data sheet: 3.35 TB/s HBM3, 989 TFLOP/s dense bf16, 80 GB. 70 % of bandwidth and 50 % of FLOP/s
# are what large kernels reach. Overhead: 128 all-reduces of about 10 us, 1.5 ms of scheduler and launches.
# Push of 65.5 GB: peers publish 6 to 18 s for this model.
H100 = Hardware(
    bytes_per_s=3.35e12,
    bytes_used=0.7,
    flops_per_s=989e12,
    flops_used=0.5,
    mfu=0.35,
    memory_bytes=80 * 2**30,
    reserved_bytes=3 * 2**30,
    overhead_s=0.003,
    start_s=180.0,
    sync_s=10.0,
)
# Two AVX-512 cores: 15 GB/s a thread, 90 GFLOP/s a core in fp32.
TWO_CORES = Hardware(
    bytes_per_s=30e9,
    bytes_used=0.5,
    flops_per_s=180e9,
    flops_used=0.8,
    mfu=0.9,
    memory_bytes=8 * 2**30,
    reserved_bytes=0.0,
    overhead_s=0.010,
    start_s=25.0,
    sync_s=0.05,
)
# By the last part of model.path. Qwen2.5-32B: config.json's 64 layers, 8 KV heads of 128, keys and values,
# bf16 = 262,144 bytes a token. Its mean context belongs to the default mixture: E[L^2] / 2 E[L] + 200 is
# about 4,300.
KNOWN: dict[str, tuple[ModelFacts, Hardware]] = {
    "Qwen2.5-32B": (
        ModelFacts(params=32.76e9, kv_bytes=64 * 8 * 128 * 2 * 2, bytes_per_param=2, mean_context=4300),
        H100,
    ),
    "tiny_base": (
        ModelFacts(params=3.6e6, kv_bytes=4 * 2 * 64 * 2 * 4, bytes_per_param=4, mean_context=30),
        TWO_CORES,
    ),
    "smollm2": (
        ModelFacts(params=134.5e6, kv_bytes=30 * 3 * 64 * 2 * 4, bytes_per_param=4, mean_context=150),
        TWO_CORES,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to engine number `engine`, `at_s` seconds after the first step has begun.

    death: its process ends; `starts_fail` of its next starts fail, and then `warm_ups_fail` of the servers
    that come up end at their first request (out of memory). stall: it makes no more tokens, and answers.
    slow: it decodes `factor` times slower. failing: a `share` of the requests sent to it fails. A restart
    mends all of them.
    """

    engine: int
    kind: Literal["death", "stall", "slow", "failing"]
    at_s: float
    factor: float = 10.0
    starts_fail: int = 0
    warm_ups_fail: int = 0
    share: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Every number of a simulated run. Field names are the keys of an `--engine-speed` file.

    tokens_per_second: of one engine, all running sequences together, by their number. kv_tokens: what its
    cache holds. prefill_tokens_per_second: prompt tokens read. train_tokens_per_second: prompt and response
    tokens, of the whole policy. sync_s: one weight push to all engines. start_s: of a server. request_s: of
    one request outside the engine. grade_s: of a response. rollout_s: of a step's rollout when all is graded
    (packing). train_s: of an update phase, beside its tokens. colocated: engines and policy share GPUs, so
    engines sleep while the policy trains and while weights are pushed.
    """

    tokens_per_second: Mapping[int, float]
    kv_tokens: float
    prefill_tokens_per_second: float
    start_s: float
    sync_s: float
    train_tokens_per_second: float
    prompt_tokens: int = 200
    request_s: float = 0.0
    grade_s: float = 0.0
    rollout_s: float = 0.0
    train_s: float = 0.0
    colocated: bool = False
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        if not self.tokens_per_second:
            raise UserError(
                "tokens_per_second is empty; give at least one size, as in {'1': 100, '256': 6000}"
            )
        for name in ("kv_tokens", "prefill_tokens_per_second", "train_tokens_per_second", "prompt_tokens"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        for size, speed in self.tokens_per_second.items():
            if size < 1 or not speed > 0:
                raise UserError(
                    f"tokens_per_second: {size} sequences at {speed} tokens/s; both must be above 0"
                )


def speed_at(table: Mapping[int, float], sequences: int) -> float:
    """Tokens/s of an engine with so many running sequences: straight lines between the sizes of the table,
    flat beyond its largest, in proportion below its smallest.
    """
    sizes = sorted(table)
    place = bisect.bisect_left(sizes, sequences)
    if place == len(sizes):
        return table[sizes[-1]]
    if sizes[place] == sequences:
        return table[sequences]
    low, speed = (sizes[place - 1], table[sizes[place - 1]]) if place else (0, 0.0)
    share = (sequences - low) / (sizes[place] - low)
    return speed + share * (table[sizes[place]] - speed)


def planned_speed(model: ModelFacts, hardware: Hardware, gpus: int, sequences: int) -> float:
    """Tokens/s of one engine: n tokens a step, and a step reads all weights (or computes 2 x params x n FLOP,
    whichever takes longer) and then the KV cache of n contexts.
    """
    bandwidth = gpus * hardware.bytes_per_s * hardware.bytes_used
    weights_s = model.params * model.bytes_per_param / bandwidth
    products_s = 2 * model.params * sequences / (gpus * hardware.flops_per_s * hardware.flops_used)
    cache_s = sequences * model.mean_context * model.kv_bytes / bandwidth
    return sequences / (hardware.overhead_s + max(weights_s, products_s) + cache_s)


def plan(config: RunConfig) -> Profile:
    """Planned numbers for the configuration's model, engines and layout. UserError for an unknown model."""
    name = Path(config.model.path).name
    if name not in KNOWN:
        raise UserError(
            f"model.path={config.model.path}: no planned speeds for {name}, only for {', '.join(KNOWN)}; "
            "give --engine-speed a file with " + ", ".join(REQUIRED)
        )
    model, hardware = KNOWN[name]
    gpus, layout = config.rollout.tensor_parallel, config.layout
    # Forward and backward pass; one more forward pass for the old log-probabilities of several updates
    flops_per_param = 6 if config.batch.updates_per_step == 1 else 8
    ranks = layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel * layout.data_parallel
    if hardware is TWO_CORES:
        ranks = gpus = 1  # ranks and engines share the cores
    memory = hardware.memory_bytes * config.rollout.memory_utilization - hardware.reserved_bytes
    kv_bytes = gpus * memory - model.params * model.bytes_per_param
    if kv_bytes <= 0:
        raise UserError(
            f"rollout.tensor_parallel={gpus} leaves no memory for the KV cache of {name}; raise it, or "
            f"rollout.memory_utilization={config.rollout.memory_utilization}"
        )
    return Profile(
        tokens_per_second={n: planned_speed(model, hardware, gpus, n) for n in TABLE_SIZES},
        kv_tokens=math.floor(kv_bytes / model.kv_bytes),
        prefill_tokens_per_second=gpus * hardware.flops_per_s * hardware.flops_used / (2 * model.params),
        start_s=hardware.start_s,
        sync_s=hardware.sync_s,
        train_tokens_per_second=ranks
        * hardware.flops_per_s
        * hardware.mfu
        / (flops_per_param * model.params),
        prompt_tokens=min(200, config.data.max_prompt_tokens),
    )


REQUIRED = tuple(field.name for field in dataclasses.fields(Profile) if field.default is dataclasses.MISSING)


def load_profile(config: RunConfig, file: Path | None, known: Profile | None = None) -> Profile:
    """The numbers of `known`, by default the planned ones, with those of the JSON file in their place.
    UserError for unknown or missing keys.
    """
    if file is None:
        return known or plan(config)
    given = _read_object(file)
    names = [field.name for field in dataclasses.fields(Profile)]
    if unknown := sorted(given.keys() - names):
        raise UserError(f"{file}: unknown keys {', '.join(unknown)}; known: {', '.join(names)}")
    try:
        if "tokens_per_second" in given:
            speeds = given["tokens_per_second"].items()
            given["tokens_per_second"] = {int(size): float(speed) for size, speed in speeds}
        given["faults"] = tuple(_fault(row) for row in given.get("faults", ()))
        whole = given.keys() >= set(REQUIRED)
        return Profile(**given) if whole else dataclasses.replace(known or plan(config), **given)
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from error


def _fault(row: dict[str, Any]) -> Fault:
    fault = Fault(**row)
    kinds = get_args(get_type_hints(Fault)["kind"])
    if fault.kind not in kinds:
        raise UserError(f"faults: kind={fault.kind!r} must be one of {', '.join(kinds)}")
    return fault


def _read_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}, not an object with {', '.join(REQUIRED)}")
    return values
