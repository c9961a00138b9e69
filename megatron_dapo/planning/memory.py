"""The memory of a run's GPUs in every phase of a step: what lies there, for each kind of rank, and whether it
fits. Planned from shapes, data sheets and stated assumptions (hardware.py); nothing is started.

A step goes through the phases in their order (trainer.py). With rollout.sleep engines and policy take turns:
engines have given weights and cache back in `old_logprobs` and `update`; optimizer state is in the host's
memory and the gradients are dropped in `generate` and `sync` (policy/offload.py). A reference model is on the
GPU while it computes, in `old_logprobs` (policy/reference.py); a value model is treated as the policy is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_dapo.config import RunConfig
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.planning.activations import Activations, rank_activations
from megatron_dapo.planning.hardware import ASSUMED, GIB, Gpu
from megatron_dapo.planning.models import Models, forward_passes, models_of
from megatron_dapo.planning.sizes import Sizes, rank_sizes
from megatron_dapo.weights.block_fp8 import linear_weights
from megatron_dapo.weights.names import hf_shapes

PHASES: tuple[str, ...] = ("generate", "old_logprobs", "update", "sync")
ENGINES = -1  # the `stage` of GPUs that have engines and no policy
Parts = dict[str, float]  # bytes by what they are for


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """GPUs that are planned alike: `ranks` of them, those of a pipeline stage. sizes: of the policy. parts:
    by phase. offloaded: bytes in the host's memory while engines are awake, a reference model's included.
    """

    stage: int
    ranks: int
    sizes: Sizes
    in_flight: int
    offloaded: float
    parts: dict[str, Parts]

    def total(self, phase: str) -> float:
        return sum(self.parts[phase].values())


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """kv_tokens: what an engine's cache holds; below 1 when there is no room for it."""

    gpu: Gpu
    ranks: tuple[RankMemory, ...]
    kv_tokens: float
    takes_turns: bool

    def fullest(self, phase: str) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.total(phase))

    def peak(self, phase: str) -> float:
        return self.fullest(phase).total(phase)

    def free(self, *phases: str) -> float:
        """Bytes that stay free on the fullest GPU in these phases; negative when something does not fit."""
        return self.gpu.speed.memory_bytes - max(map(self.peak, phases))

    @property
    def margin(self) -> float:
        return self.free(*PHASES)


def plan_memory(
    config: RunConfig,
    model: ModelSpec,
    gpu: Gpu,
    sizes: Callable[..., Sizes] = rank_sizes,
    stages: Iterable[int] | None = None,
    reference: ModelSpec | None = None,
) -> MemoryPlan:
    """Of a run with TransformerEngine's layers on these GPUs. sizes: of a rank of a pipeline stage, as
    rank_sizes. stages: default all of them. reference: the reference model; default the policy's.
    """
    layout, turns = config.layout.to_layout(), takes_turns(config)
    ranks = []
    for stage in stages or range(layout.pp):
        models = models_of(config, model, stage, gpu, sizes, reference)
        kept = rank_activations(config, model, stage, micro_batches=most_micro_batches(config))
        stays = 1 - config.optimizer.cpu_offload
        away = sum(size.optimizer for size in models.trained) * (1.0 if turns and stays == 1 else 1 - stays)
        ranks.append(
            RankMemory(
                stage=stage,
                ranks=layout.world_size // layout.pp,
                sizes=models.policy,
                in_flight=kept.in_flight,
                offloaded=away + models.reference,
                parts={phase: _rank_parts(config, model, gpu, models, kept, phase) for phase in PHASES},
            )
        )
    if not config.rollout.colocated:
        awake = _engine_parts(config, model, gpu, awake="all")
        nothing = Sizes(elements=0, weights=0, gradients=0, optimizer=0)
        engines = dict.fromkeys(PHASES, awake)
        ranks.append(
            RankMemory(stage=ENGINES, ranks=0, sizes=nothing, in_flight=0, offloaded=0.0, parts=engines)
        )
    cache = config.rollout.tensor_parallel * _cache_bytes(config, model, gpu)
    return MemoryPlan(
        gpu=gpu, ranks=tuple(ranks), kv_tokens=cache / kv_bytes(config, model), takes_turns=turns
    )


def takes_turns(config: RunConfig) -> bool:
    """Whether engines sleep while the policy trains, on GPUs."""
    sleep = config.rollout.sleep
    if sleep == "auto":
        return config.rollout.colocated and config.sampling.max_age == 0
    return sleep


def most_micro_batches(config: RunConfig) -> int:
    """Of an update, on a data-parallel rank, if every sample fills one."""
    samples = config.sampling.prompts_per_step * config.sampling.samples_per_prompt
    multiple = config.layout.to_layout().micro_batch_multiple
    each = math.ceil(samples / config.batch.updates_per_step / config.layout.data_parallel)
    return math.ceil(each / multiple) * multiple


# --- the policy -------------------------------------------------------------------------


def _rank_parts(
    config: RunConfig, model: ModelSpec, gpu: Gpu, models: Models, kept: Activations, phase: str
) -> Parts:
    """On a GPU of a policy rank, with its share of the engines where they are colocated."""
    turns, trains = takes_turns(config), phase in ("old_logprobs", "update")
    parts: Parts = dict(models.weights)
    if models.reference and phase == "old_logprobs":
        parts["reference model's weights"] = models.reference + models.reference_copies
    if trains or not turns:
        parts["gradients"] = sum(size.gradients for size in models.trained)
        if models.fp8_copies:
            parts["weights in FP8"] = models.fp8_copies
    stays = 1 - config.optimizer.cpu_offload
    if stays and (trains or not turns or stays < 1):
        parts["optimizer state"] = sum(size.optimizer for size in models.trained) * stays
    if phase == "update":
        parts["activations"] = kept.kept
        parts["recomputed, gradients of activations"] = kept.backward
        if kept.logprobs > kept.backward:  # one follows the other
            parts["log-probabilities"] = kept.logprobs - kept.backward
    if phase == "old_logprobs" and any(forward_passes(config)):
        parts["activations"] = max(kept.forward, kept.logprobs_forward)
    if staged := staging_bytes(config, model, gpu):
        parts["staging of pushes"] = staged
    parts["fragmentation"] = ASSUMED.fragmentation * sum(parts.values())
    parts["context, NCCL"] = ASSUMED.context_gib * GIB
    if config.rollout.colocated:
        asleep = turns and trains
        awake = "nothing" if asleep else "weights" if turns and phase == "sync" else "all"
        parts |= _engine_parts(config, model, gpu, awake=awake)
    return parts


def staging_bytes(config: RunConfig, model: ModelSpec, gpu: Gpu) -> float:
    """Two chunks of every worker that a rank carries, and what it packs for other hosts at once; for engines
    on hosts of their own only that. Kept between pushes (sync/staging.py).
    """
    rollout, world = config.rollout, config.layout.to_layout().world_size
    chunk = min(float(config.sync.chunk_bytes), engine_weights(config, model))
    here = min(world, gpu.per_host)
    carried = math.ceil(rollout.engines * rollout.tensor_parallel / here) if rollout.colocated else 0
    sends = ASSUMED.send_chunks if world > gpu.per_host else 0.0
    return chunk * (2 * carried + sends)


# --- engines ----------------------------------------------------------------------------


def _engine_parts(config: RunConfig, model: ModelSpec, gpu: Gpu, *, awake: str) -> Parts:
    """Of one worker. awake: all (it may fill its share), weights (a push brings them) or nothing."""
    parts: Parts = {"engine, other": ASSUMED.engine_gib * GIB}
    if awake != "nothing":
        parts["engine weights"] = engine_weights(config, model)
    if awake == "weights":
        parts["a module while it is repacked"] = 2 * _largest_module(config, model)
    if awake == "all":
        parts["KV cache"] = max(0.0, _cache_bytes(config, model, gpu))
    return parts


def _cache_bytes(config: RunConfig, model: ModelSpec, gpu: Gpu) -> float:
    """Of one worker; negative when not even the rest fits into its share."""
    share = config.rollout.memory_utilization * gpu.speed.memory_bytes
    return share - engine_weights(config, model) - ASSUMED.engine_gib * GIB


def kv_bytes(config: RunConfig, model: ModelSpec) -> float:
    """Of one token, over all workers of an engine: each has a key/value head at least."""
    heads = max(model.num_kv_heads, config.rollout.tensor_parallel)
    return 2 * model.num_layers * heads * model.head_dim * _item(config)


def engine_weights(config: RunConfig, model: ModelSpec) -> float:
    """Bytes of one worker's weights."""
    elements, in_layers = _elements(model)
    size = elements * float(_item(config))
    if config.rollout.quantization:
        size -= in_layers  # one byte each, and few scales
    return size / config.rollout.tensor_parallel


@functools.lru_cache(maxsize=8)
def _elements(model: ModelSpec) -> tuple[int, int]:
    """Of the whole model, and of the matrices that rollout.quantization makes FP8."""
    shapes = hf_shapes(model)
    return sum(map(math.prod, shapes.values())), sum(map(math.prod, linear_weights(shapes).values()))


def _largest_module(config: RunConfig, model: ModelSpec) -> float:
    matrices = max(model.num_experts, 1) * 2 * model.ffn_size
    largest = max(matrices, model.vocab_size) * model.hidden_size
    return largest * _item(config) / config.rollout.tensor_parallel


def _item(config: RunConfig) -> int:
    return 2 if config.model.dtype == "bf16" else 4
