"""Rules between the fields of a configuration, each with its remedy. What one field may be stands on the field, in config.py; what
the model and the machine must have is checked by `train.check` and policy/fp8_rules.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dapo.layout import round_up

if TYPE_CHECKING:
    from megatron_dapo.config import Fp8Config, RunConfig


def check(config: RunConfig) -> None:
    """ValueError names the fields, their values, the rule and the remedy. Nothing has been started yet."""
    _check_policy(config)
    if config.policy.fp8 is not None:
        _check_fp8(config, config.policy.fp8)
    _check_batch(config)
    _check_rest(config)


def _check_policy(config: RunConfig) -> None:
    policy = config.policy
    if policy.overlap_param_gather and not (policy.overlap_grad_reduce and config.optimizer.distributed):
        raise ValueError(
            "policy.overlap_param_gather=true needs policy.overlap_grad_reduce=true and optimizer.distributed=true; set both or drop it"
        )
    if policy.overlap_tensor_parallel and not config.layout.sequence_parallel:
        raise ValueError("policy.overlap_tensor_parallel=true needs layout.sequence_parallel=true; set it or drop the overlap")
    if config.optimizer.decay == "cosine" and config.optimizer.decay_updates is None:
        raise ValueError("optimizer.decay=cosine needs optimizer.decay_updates, the number of updates over which it decays")
    if config.optimizer.cpu_offload and not (config.model.dtype == "bf16" and config.optimizer.distributed):
        raise ValueError(
            f"optimizer.cpu_offload={config.optimizer.cpu_offload} needs model.dtype=bf16 and optimizer.distributed=true: Megatron "
            "offloads the sharded fp32 master weights of bf16 parameters; set both, or cpu_offload to 0"
        )


def _check_fp8(config: RunConfig, fp8: Fp8Config) -> None:
    if fp8.recipe == "delayed" and fp8.first_last_bf16:
        raise ValueError(
            "policy.fp8.first_last_bf16=true does not work with policy.fp8.recipe=delayed, whose scales are updated for all layers "
            "at once; use another recipe or set it to false"
        )
    if fp8.param_gather and not config.optimizer.distributed:
        raise ValueError("policy.fp8.param_gather=true needs optimizer.distributed=true, which is what gathers parameters")
    if fp8.param_gather and config.model.dtype != "bf16":
        raise ValueError(
            f"policy.fp8.param_gather=true needs model.dtype=bf16, not {config.model.dtype}: fp32 weights have no master copy to "
            "quantise from"
        )
    if fp8.param_gather and fp8.recipe != "delayed" and config.optimizer.cpu_offload:
        raise ValueError(
            f"policy.fp8.param_gather=true with policy.fp8.recipe={fp8.recipe} does not work with optimizer.cpu_offload="
            f"{config.optimizer.cpu_offload}: Megatron has no bf16 shards to update; set one of them to false or 0"
        )


def _check_batch(config: RunConfig) -> None:
    layout, sampling = config.layout.to_layout(), config.sampling
    num_samples = sampling.prompts_per_step * sampling.samples_per_prompt
    parts = config.batch.updates_per_step * layout.dp
    if num_samples % parts:
        raise ValueError(
            f"sampling.prompts_per_step x sampling.samples_per_prompt = {num_samples} samples do not divide into "
            f"batch.updates_per_step={config.batch.updates_per_step} x layout.data_parallel={layout.dp}; change one of the four"
        )
    if sampling.low > sampling.high or (sampling.low == sampling.high and not sampling.inclusive):
        raise ValueError(f"sampling.low={sampling.low} leaves nothing below sampling.high={sampling.high}; lower it")
    if sampling.prompt_cap < sampling.prompts_per_step:
        raise ValueError(
            f"sampling.max_prompts={sampling.max_prompts} is below sampling.prompts_per_step={sampling.prompts_per_step}; raise it"
        )
    if config.reward.overlong_cache > config.rollout.max_tokens:
        raise ValueError(
            f"reward.overlong_cache={config.reward.overlong_cache} exceeds rollout.max_tokens={config.rollout.max_tokens}; lower it"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    padded = round_up(longest, layout.sequence_multiple)
    if config.batch.max_tokens < padded:
        raise ValueError(
            f"batch.max_tokens={config.batch.max_tokens} is below the longest possible sample, data.max_prompt_tokens + "
            f"rollout.max_tokens = {longest}; raise it to at least {padded}"
        )


def _check_rest(config: RunConfig) -> None:
    if config.run.verify_sync and not config.checkpoint.export_hf:
        raise ValueError("run.verify_sync=true compares with the exported checkpoint; set checkpoint.export_hf=true")
    if config.evaluation.temperature == 0 and config.evaluation.samples > 1:
        raise ValueError(
            f"evaluation.temperature=0 is greedy, so evaluation.samples={config.evaluation.samples} would all be equal; set it to 1"
        )
    if "{prompt}" not in config.data.template:
        raise ValueError(f"data.template={config.data.template!r} must hold {{prompt}}, where the problem goes")
    if config.data.few_shot and not config.data.chat:
        raise ValueError("data.few_shot needs data.chat=true; put the examples into data.template otherwise")
    if config.objective.mismatch_low is not None and config.objective.mismatch_correction != "mask":
        raise ValueError(
            f"objective.mismatch_low={config.objective.mismatch_low} is for objective.mismatch_correction=mask, not "
            f"{config.objective.mismatch_correction}; set it to null or mask"
        )
