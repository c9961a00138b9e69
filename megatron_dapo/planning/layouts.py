"""Layouts for a model on so many GPUs: every combination of a few sizes is planned (memory.py, step_time.py);
those that fit are ranked by the estimated step, and of each of the others it is said why it does not.

Only colocated engines are searched, since how GPUs are shared out between policy and engines of their own is
what tools/simulate.py answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_dapo.config import LayoutConfig, PolicyConfig, RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.layout import round_up
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.planning.hardware import GIB, Gpu
from megatron_dapo.planning.memory import MemoryPlan, plan_memory, takes_turns
from megatron_dapo.planning.step_time import (
    StepTime,
    Workload,
    active_parameters,
    engine_speed,
    estimate,
)

MARGIN = 5 * GIB  # that must stay free on every GPU
LARGEST_SHARE, SHARE_STEP = 0.9, 0.05  # of rollout.memory_utilization
LEAST_SEQUENCES = 8  # of mean length, that an engine's cache must hold
SIZES = (1, 2, 4, 8)
EXPERT_SIZES = (1, 2, 4, 8, 16, 32)
MOST_STAGES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    config: RunConfig
    memory: MemoryPlan
    time: StepTime
    engines: int  # on all hosts together


@dataclass(slots=True, kw_only=True)
class Rejected:
    """Combinations that one reason rules out, in words, each with the bytes that it lacks (infinite where
    that means nothing).
    """

    each: list[tuple[str, float]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.each)

    @property
    def closest(self) -> tuple[str, float]:
        """The first of those that lack least."""
        return min(self.each, key=lambda one: one[1])


def search(
    config: RunConfig, model: ModelSpec, gpu: Gpu, gpus: int, work: Workload
) -> tuple[list[Proposal], dict[str, Rejected]]:
    """Of the run `config` with other layouts, recomputation, micro-batches and engines; best first, and the
    rejected by reason. UserError if it is not colocated.
    """
    if not config.rollout.colocated:
        raise UserError(
            "rollout.colocated=false: layouts are searched for engines on the policy's GPUs; set it to true, "
            "or plan the two kinds of hosts with tools/plan.py memory and tools/simulate.py"
        )
    if gpus > gpu.per_host and gpus % gpu.per_host:
        raise UserError(f"--gpus {gpus} must be a multiple of the {gpu.per_host} GPUs of a host, or below")
    found: list[Proposal] = []
    rejected: dict[str, Rejected] = {}
    for candidate in _policies(config, model, gpus, rejected):
        best = _with_engines(candidate, model, gpu, gpus, work, rejected)
        if best is not None:
            found.append(best)
    return sorted(found, key=lambda proposal: proposal.time.step), rejected


def _policies(
    config: RunConfig, model: ModelSpec, gpus: int, rejected: dict[str, Rejected]
) -> Iterator[RunConfig]:
    """Configurations whose layouts divide the model, the GPUs and the samples of an update."""
    samples = config.sampling.prompts_per_step * config.sampling.samples_per_prompt
    for layout in _layouts(model, gpus, rejected):
        try:
            layout.to_layout().check_model(
                num_layers=model.num_layers,
                num_heads=model.num_heads,
                num_kv_heads=model.num_kv_heads,
                hidden_size=model.hidden_size,
                ffn_size=model.ffn_size,
                num_experts=model.num_experts,
            )
        except UserError as error:
            name = layout.to_layout().describe()
            _reject(rejected, "the layout does not split the model", f"{name}: {error}")
            continue
        if samples % (config.batch.updates_per_step * layout.data_parallel):
            name = layout.to_layout().describe()
            _reject(rejected, "the samples of an update do not divide over the replicas", name)
            continue
        longest = round_up(
            config.data.max_prompt_tokens + config.rollout.max_tokens, layout.to_layout().sequence_multiple
        )
        for policy in _recomputations(config.policy, model):
            for micro_batch in (longest, 2 * longest):
                batch = config.batch.model_copy(update={"max_tokens": micro_batch})
                yield config.model_copy(update={"layout": layout, "policy": policy, "batch": batch})


def _layouts(model: ModelSpec, gpus: int, rejected: dict[str, Rejected]) -> Iterator[LayoutConfig]:
    stages = [pp for pp in range(1, MOST_STAGES + 1) if model.num_layers % pp == 0]
    for tp in SIZES:
        for pp in stages:
            for cp in SIZES:
                if gpus % (tp * pp * cp):
                    _reject(rejected, "it does not divide the GPUs", f"tp{tp} x pp{pp} x cp{cp}")
                    continue
                dp = gpus // (tp * pp * cp)
                chunks = model.num_layers // pp
                virtual = [None, *(v for v in (2, 4, 8) if pp > 1 and chunks % v == 0)]
                experts = [ep for ep in EXPERT_SIZES if model.num_experts and tp * cp * dp % ep == 0]
                for vpp in virtual:
                    for ep in experts or [1]:
                        yield LayoutConfig(
                            tensor_parallel=tp,
                            sequence_parallel=tp > 1,
                            pipeline_parallel=pp,
                            virtual_pipeline_parallel=vpp,
                            context_parallel=cp,
                            expert_parallel=ep,
                            data_parallel=dp,
                        )


def _recomputations(policy: PolicyConfig, model: ModelSpec) -> Iterator[PolicyConfig]:
    modules = (["moe_act"], ["moe"], ["layernorm", "moe"]) if model.num_experts else (["mlp"],)
    yield policy.model_copy(update={"recompute": None})
    for names in modules:
        yield policy.model_copy(update={"recompute": "selective", "recompute_modules": names})
    yield policy.model_copy(update={"recompute": "full", "recompute_layers": 1})


def _with_engines(
    config: RunConfig,
    model: ModelSpec,
    gpu: Gpu,
    gpus: int,
    work: Workload,
    rejected: dict[str, Rejected],
) -> Proposal | None:
    """With the engines that make its step shortest, among those that fit beside it."""
    here, found = min(gpus, gpu.per_host), []
    for tp in SIZES:
        if here % tp or tp > model.num_kv_heads or model.num_heads % tp:
            continue
        beside, memory = _largest_share(config, model, gpu, tp, here // tp)
        if takes_turns(config) and (free := memory.free("old_logprobs", "update")) < MARGIN:
            _reject(rejected, "an update does not fit", _name(config), MARGIN - free)
            return None
        if memory.margin >= MARGIN and memory.kv_tokens >= LEAST_SEQUENCES * work.context:
            time = estimate(beside, model, memory, work, engines=gpus // tp)
            found.append(Proposal(config=beside, memory=memory, time=time, engines=gpus // tp))
    if not found:
        _reject(rejected, "no engine has room for a cache beside the policy", _name(config))
        return None
    return min(found, key=lambda proposal: proposal.time.step)


def _largest_share(
    config: RunConfig, model: ModelSpec, gpu: Gpu, tp: int, number: int
) -> tuple[RunConfig, MemoryPlan]:
    """With so many engines on a host, and the largest rollout.memory_utilization that leaves MARGIN."""
    ends = {0, config.layout.pipeline_parallel - 1}  # of the pipeline, which have the most
    engines = {"tensor_parallel": tp, "engines": number, "memory_utilization": LARGEST_SHARE}
    beside = config.model_copy(update={"rollout": config.rollout.model_copy(update=engines)})
    memory = plan_memory(beside, model, gpu, stages=ends)
    lacks = max(0.0, MARGIN - memory.margin) / gpu.speed.memory_bytes
    steps = math.ceil(lacks / SHARE_STEP)
    if not steps or LARGEST_SHARE - steps * SHARE_STEP < SHARE_STEP:
        return beside, memory
    engines["memory_utilization"] = round(LARGEST_SHARE - steps * SHARE_STEP, 2)
    beside = config.model_copy(update={"rollout": config.rollout.model_copy(update=engines)})
    return beside, plan_memory(beside, model, gpu, stages=ends)


def _reject(rejected: dict[str, Rejected], reason: str, example: str, over: float = math.inf) -> None:
    rejected.setdefault(reason, Rejected()).each.append((example, over))


# --- in words ---------------------------------------------------------------------------


def overrides(proposal: Proposal) -> list[str]:
    """What makes a configuration this proposal, as section.key=value."""
    config = proposal.config
    fields: list[tuple[str, Any]] = [(f"layout.{k}", v) for k, v in config.layout.model_dump().items()]
    fields += [("policy.recompute", config.policy.recompute)]
    if config.policy.recompute == "selective":
        fields += [("policy.recompute_modules", f"[{','.join(config.policy.recompute_modules)}]")]
    fields += [("batch.max_tokens", config.batch.max_tokens)]
    for key in ("engines", "tensor_parallel", "memory_utilization"):
        fields += [(f"rollout.{key}", getattr(config.rollout, key))]
    return [f"{key}={_word(value)}" for key, value in fields]


def _word(value: Any) -> str:
    """As YAML has it."""
    return (
        {True: "true", False: "false"}[value]
        if isinstance(value, bool)
        else "null"
        if value is None
        else str(value)
    )


def _name(config: RunConfig) -> str:
    """A combination without its engines, in one line."""
    policy = config.policy
    again = policy.recompute or "nothing"
    if policy.recompute == "selective":
        again = "+".join(policy.recompute_modules)
    return f"{config.layout.to_layout().describe()}, {config.batch.max_tokens} tokens, recomputes {again}"


def simulator_profile(proposal: Proposal, model: ModelSpec, work: Workload) -> dict[str, Any]:
    """What tools/simulate.py takes as --engine-speed (rollout/simulate_model.py, Profile)."""
    config, memory, speed = proposal.config, proposal.memory, proposal.memory.gpu.speed
    samples = config.sampling.prompts_per_step * config.sampling.samples_per_prompt
    trained = samples * (work.prompt + work.response)
    table = engine_speed(config, model, memory, work)
    return {
        "tokens_per_second": {str(n): round(tokens, 1) for n, tokens in table.items()},
        "kv_tokens": math.floor(memory.kv_tokens),
        "prefill_tokens_per_second": round(
            config.rollout.tensor_parallel
            * speed.flops_per_s
            * speed.flops_used
            / (2 * active_parameters(model))
        ),
        "start_s": speed.start_s,
        "sync_s": speed.sync_s + proposal.time.switch,
        "train_tokens_per_second": round(trained / (proposal.time.update + proposal.time.old_logprobs)),
        "prompt_tokens": round(work.prompt),
        "colocated": memory.takes_turns,
    }
