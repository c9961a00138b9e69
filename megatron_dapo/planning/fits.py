"""A run whose memory cannot suffice is refused before it starts: `preflight.check(config, deep=True)`."""

from __future__ import annotations

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import ModelSpec, read_model
from megatron_dapo.planning.hardware import GIB, GPUS, Gpu
from megatron_dapo.planning.memory import PHASES, plan_memory
from megatron_dapo.policy import fp8_rules, rules
from megatron_dapo.weights.hf import resolve_folder

REMEDIES = {
    "generate": "lower rollout.memory_utilization",
    "old_logprobs": "raise layout.tensor_parallel or context_parallel",
    "update": "set policy.recompute, or raise layout.tensor_parallel, pipeline_parallel or context_parallel",
    "sync": "lower sync.chunk_bytes",
}


def memory_suffices(config: RunConfig, model: ModelSpec, gpu: Gpu | None = None) -> None:
    """UserError names the phase of a step in which a GPU is too small, and what fills it. gpu: default the
    one of this machine, or an H100 where there is none that is known.
    """
    gpu = gpu or gpu_here()
    path, total = config.objective.reference, gpu.speed.memory_bytes / GIB
    reference = read_model(resolve_folder(path)) if path else None
    plan = plan_memory(config, model, gpu, reference=reference)
    if plan.kv_tokens < 1:
        raise UserError(
            f"rollout.memory_utilization={config.rollout.memory_utilization} of an {gpu.name} ({total:.1f} "
            f"GiB) leaves no KV cache beside the weights of rollout.tensor_parallel="
            f"{config.rollout.tensor_parallel}; raise one of them"
        )
    phase = max(PHASES, key=plan.peak)
    if plan.margin >= 0:
        return
    parts = sorted(plan.fullest(phase).parts[phase].items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts[:3])
    raise UserError(
        f"{phase} is planned to take {plan.peak(phase) / GIB:.1f} GiB of an {gpu.name}'s {total:.1f} "
        f"({largest}); {REMEDIES[phase]} (tools/plan.py memory shows all of it)"
    )


def check_model(config: RunConfig, model: ModelSpec, gpu: Gpu | None) -> None:
    """The rules about the model (policy/rules.py) on that GPU, or on a CPU, whatever this machine has. CUDA
    and TransformerEngine are taken as new enough for policy.fp8, and a reference model's tokens as the same.
    """
    fp8 = config.policy.fp8
    policy = config.policy.model_copy(update={"fp8": None})
    objective = config.objective.model_copy(update={"reference": None})
    plain = config.model_copy(update={"policy": policy, "objective": objective})
    rules.check_model(plain, model, on_cpu=gpu is None)
    if fp8 is None:
        return
    fp8_rules.check_model(fp8, model, config.layout.to_layout())
    if gpu is None:
        fp8_rules.check_cpu(fp8)
        return
    fp8_rules.check_gpu(
        fp8,
        dtype=config.model.dtype,
        capability=gpu.capability,
        cuda="99.0",
        transformer_engine=fp8_rules.LEAST_TRANSFORMER_ENGINE,
    )


def gpu_here() -> Gpu:
    """The row of the table that this machine's first GPU is named after; H100 without one."""
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return next((gpu for gpu in GPUS.values() if gpu.name in name), GPUS["H100"])
