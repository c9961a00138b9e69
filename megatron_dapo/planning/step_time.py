"""Seconds of a step from FLOPs and bytes: an estimate, by data sheets (hardware.py), stated efficiencies and
a mean length. tools/simulate.py follows every request and says more about `generate`.

Legend: as in activations.py; T tokens of a micro-batch on a rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dapo.config import RunConfig
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.planning.activations import GPU_LAYERS, recomputed_per_token
from megatron_dapo.planning.hardware import ASSUMED, Gpu
from megatron_dapo.planning.memory import MemoryPlan, engine_weights, kv_bytes
from megatron_dapo.planning.models import forward_passes
from megatron_dapo.planning.sizes import rank_elements
from megatron_dapo.rollout.simulate_model import TABLE_SIZES, ModelFacts, planned_speed, speed_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Means over a step. context: tokens before the one that is sampled or trained, mean over all of them.
    informative: share of the sampled groups that is trained on.
    """

    prompt: float
    response: float
    context: float
    informative: float


def default_workload(config: RunConfig) -> Workload:
    """The simulator's mixture (docs/simulator.md): responses of 5,000 tokens under a cap of 20,480 and so in
    proportion, prompts of 200, 41 % informative groups with dynamic sampling.
    """
    response = config.rollout.max_tokens * 5000 / 20480
    prompt = min(200, config.data.max_prompt_tokens)
    return Workload(
        prompt=prompt,
        response=response,
        context=prompt + 0.82 * response,  # E[L^2] / 2 E[L] of its log-normal lengths
        informative=0.41 if config.sampling.dynamic else 1.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step's phases. update_parts: of `update`, what they add. mfu: of the update, without what
    is recomputed.
    """

    generate: float
    switch: float
    old_logprobs: float
    update: float
    sync: float
    update_parts: dict[str, float]
    mfu: float

    @property
    def step(self) -> float:
        return self.generate + self.switch + self.old_logprobs + self.update + self.sync


def estimate(
    config: RunConfig, model: ModelSpec, plan: MemoryPlan, work: Workload, *, engines: int
) -> StepTime:
    """With so many engines on all hosts together. With sampling.max_age >= 1 engines generate while the
    policy trains, and `generate` is what is left of it then.
    """
    gpu, updates = plan.gpu, config.batch.updates_per_step
    layout = config.layout.to_layout()
    samples = config.sampling.prompts_per_step * config.sampling.samples_per_prompt
    tokens = samples * (work.prompt + work.response)
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    fill = min(0.95, config.batch.max_tokens / longest * 0.95)  # packing (tools/bench.py packing)
    per_update = tokens / updates / layout.dp / (config.batch.max_tokens * fill)
    count = math.ceil(max(1.0, per_update) / layout.micro_batch_multiple) * layout.micro_batch_multiple
    full = per_update / count  # how full the micro-batches are
    train = _pass(config, model, gpu, work, count=count, full=full, backward=True)
    other = {"gradients, parameters": _data_parallel(config, model, gpu), "optimizer": _optimizer(plan)}
    parts = {name: seconds * updates for name, seconds in (train | other).items()}
    passes, values = forward_passes(config), forward_passes(config)[2]
    look = _pass(config, model, gpu, work, count=count, full=full, backward=False)
    if values:  # as the policy, but for the output layer
        parts["value model"] = sum(parts.values()) - parts["output layer"]
    update, old_logprobs = sum(parts.values()), sum(look.values()) * updates * sum(passes)
    flops = (2 if values else 1) * 3 * tokens * _flops(model, work) / layout.world_size
    offload = max(rank.offloaded for rank in plan.ranks) if plan.takes_turns else 0.0
    switch = 2 * offload / ASSUMED.to_host_bytes_per_s + ASSUMED.switch_s if plan.takes_turns else 0.0
    generate = _generate(config, model, plan, work, engines, samples)
    if config.sampling.max_age:
        generate = max(0.0, generate - update - old_logprobs)
    return StepTime(
        generate=generate,
        switch=switch,
        old_logprobs=old_logprobs,
        update=update,
        sync=gpu.speed.sync_s,
        update_parts=parts,
        mfu=flops / update / gpu.speed.flops_per_s,
    )


def _flops(model: ModelSpec, work: Workload) -> float:
    """Of one token's forward pass through the whole model."""
    layer = sum(_layer_flops(model, work.context))
    return model.num_layers * layer + 2 * model.vocab_size * model.hidden_size


def _layer_flops(model: ModelSpec, context: float) -> tuple[float, float, float]:
    """Of one token: dense matrices, matrices of the experts, scores and values of `context` tokens."""
    projections = 2 * model.hidden_size * (2 * model.query_size + 2 * model.key_size)
    mlp = 2 * 3 * model.hidden_size * model.ffn_size
    attention = 4 * model.query_size * context
    if model.num_experts:
        return projections, model.experts_per_token * mlp, attention
    return projections + mlp, 0.0, attention


# --- the policy -------------------------------------------------------------------------


def _pass(
    config: RunConfig, model: ModelSpec, gpu: Gpu, work: Workload, *, count: int, full: float, backward: bool
) -> dict[str, float]:
    """Seconds of `count` micro-batches through the pipeline, by what takes them."""
    layout, speed = config.layout.to_layout(), gpu.speed
    size, tokens = 2, config.batch.max_tokens * full / layout.cp
    rows = GPU_LAYERS.rows(model, layout, size, None)
    dense, expert, attention = (
        tokens * flops / layout.tp / speed.flops_per_s for flops in _layer_flops(model, work.context)
    )
    if layout.ep > 1:
        expert *= ASSUMED.busiest_experts
    computed = (
        dense / ASSUMED.matmul + expert / ASSUMED.expert_matmul,
        attention / ASSUMED.attention,
        tokens * sum(r.per_token for r in rows) * ASSUMED.passes / (speed.bytes_per_s * ASSUMED.memory),
    )
    sent = _tensor_parallel(model, layout, gpu, tokens) + _experts(model, layout, gpu, tokens)
    sent += _context_parallel(model, layout, gpu, tokens)
    again = 0.0
    if backward and config.policy.recompute is not None:
        again = 1.0 if config.policy.recompute == "full" else _share_recomputed(config, model, layout)
    # backward: twice the products, 2.5 times the attention (flash attention computes the scores again)
    weights = (3 + again, 3.5 + again, 3 + again, 2 + again) if backward else (1.0, 1.0, 1.0, 1.0)
    names = ("products", "attention", "element-wise", "tensor, expert, context parallel")
    layers = model.num_layers // layout.pp
    stage = {n: w * layers * s for n, w, s in zip(names, weights, (*computed, sent), strict=True)}
    head = tokens * 2 * model.vocab_size * model.hidden_size / layout.tp / speed.flops_per_s / ASSUMED.matmul
    head *= 4 if backward else 1  # the logits twice
    total = {name: count * seconds for name, seconds in stage.items()} | {"output layer": count * head}
    bubbles = (layout.pp - 1) / (layout.vpp or 1)
    total["pipeline bubble"] = bubbles * sum(stage.values())
    if layout.pp > 1:
        width = size * model.hidden_size * tokens / (layout.tp if layout.sp else 1)
        once = width / (gpu.links.between_hosts * ASSUMED.links)
        total["pipeline messages"] = count * (2 if backward else 1) * (layout.vpp or 1) * once
    return total


def _share_recomputed(config: RunConfig, model: ModelSpec, layout: Layout) -> float:
    """Of a layer's forward pass, by the bytes that are made again."""
    rows = GPU_LAYERS.rows(model, layout, 2, None)
    return recomputed_per_token(rows, config.policy) / sum(row.per_token for row in rows)


def _tensor_parallel(model: ModelSpec, layout: Layout, gpu: Gpu, tokens: float) -> float:
    """Of a layer's forward pass: two gathers and two scatters, or two reductions of as many bytes."""
    part = 2 * tokens * model.hidden_size * (layout.tp - 1) / layout.tp
    return (2 if model.num_experts else 4) * part / _bandwidth(gpu, layout.tp)


def _experts(model: ModelSpec, layout: Layout, gpu: Gpu, tokens: float) -> float:
    """Tokens to their experts and back."""
    if layout.ep == 1:
        return 0.0
    rows = tokens * model.experts_per_token / (layout.tp if layout.sp else 1) * ASSUMED.busiest_experts
    part = 2 * rows * model.hidden_size * (layout.ep - 1) / layout.ep
    return 2 * part / _bandwidth(gpu, layout.ep * layout.etp)


def _context_parallel(model: ModelSpec, layout: Layout, gpu: Gpu, tokens: float) -> float:
    """Everybody's keys and values."""
    part = 2 * tokens * 2 * model.key_size / layout.tp
    return (layout.cp - 1) * part / _bandwidth(gpu, layout.tp * layout.cp)


def _bandwidth(gpu: Gpu, ranks: int) -> float:
    """Bytes/s of a rank in a group of neighbours as wide as `ranks`."""
    links = gpu.links
    return (links.inside_host if ranks <= gpu.per_host else links.between_hosts) * ASSUMED.links


def _data_parallel(config: RunConfig, model: ModelSpec, gpu: Gpu) -> float:
    """fp32 gradients scattered and bf16 parameters gathered, once an update; half of it where it overlaps."""
    layout, policy = config.layout.to_layout(), config.policy
    dense, expert = max(rank_elements(model, layout, stage) for stage in (0, layout.pp - 1))
    copies = layout.dp * layout.cp
    experts_copies = copies * layout.tp // (layout.ep * layout.etp)
    seconds = 0.0
    for elements, ranks in ((dense, copies), (expert, experts_copies)):
        gradients = 4 * (0.5 if policy.overlap_grad_reduce else 1)
        parameters = 2 * (0.5 if policy.overlap_param_gather else 1)
        wide = layout.tp * copies if ranks > 1 else 1
        sent = elements * (gradients + parameters) * (ranks - 1) / max(ranks, 1)
        seconds += sent / _bandwidth(gpu, wide)
    return seconds


def _optimizer(plan: MemoryPlan) -> float:
    """Reads and writes state and gradient of the rank's shard, and reads all gradients for their norm."""
    size = max((rank.sizes for rank in plan.ranks), key=lambda sizes: sizes.optimizer)
    return (2.5 * size.optimizer + size.gradients) / (plan.gpu.speed.bytes_per_s * ASSUMED.memory)


# --- engines ----------------------------------------------------------------------------


def engine_speed(config: RunConfig, model: ModelSpec, plan: MemoryPlan, work: Workload) -> dict[int, float]:
    """Tokens/s of one engine by running sequences, as the simulator's table."""
    rollout = config.rollout
    weights = engine_weights(config, model) * rollout.tensor_parallel
    active = active_parameters(model)
    facts = ModelFacts(
        params=active,
        kv_bytes=kv_bytes(config, model),
        bytes_per_param=weights / active,
        mean_context=work.context,
    )
    sizes = sorted({*TABLE_SIZES, rollout.max_concurrency})
    return {n: planned_speed(facts, plan.gpu.speed, rollout.tensor_parallel, n) for n in sizes}


def active_parameters(model: ModelSpec) -> float:
    """That a token is multiplied with."""
    return sum(_layer_flops(model, 0.0)) * model.num_layers / 2 + model.vocab_size * model.hidden_size


def _generate(
    config: RunConfig, model: ModelSpec, plan: MemoryPlan, work: Workload, engines: int, samples: int
) -> float:
    """All engines full until the work is done, and then the longest response on an engine with 8."""
    table = engine_speed(config, model, plan, work)
    running = max(1.0, min(config.rollout.max_concurrency, plan.kv_tokens / work.context))
    sampled = samples * work.response / work.informative
    return sampled / (engines * speed_at(table, round(running))) + config.rollout.max_tokens * 8 / table[8]
