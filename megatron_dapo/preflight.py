"""Everything that can be wrong about a run before any process starts, as small named rules.

    check(config)             a whole run: settings, model, engines, data, verifier
    check_training(config)    training alone, from saved rollouts (tools/replay.py): settings, model
    check_settings(config)    only what needs no model folder and no file: what fields may be together

Every entry point (train, api, replay, bench) passes through one of them. UserError names the fields, their
values, the rule and the remedy. What one field may be stands on the field (config/); what the policy cannot
represent is in policy/rules.py, which the policy checks by itself once more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_dapo.config import RunConfig
from megatron_dapo.data import rules as data_rules
from megatron_dapo.disk import checkpoints_have_room
from megatron_dapo.errors import UserError
from megatron_dapo.layout import Layout, round_up
from megatron_dapo.model_spec import ModelSpec, read_model
from megatron_dapo.policy import rules
from megatron_dapo.reward import settings as reward_settings

# What vLLM's CPU attention has kernels for: vllm 0.32, vllm/v1/attention/backends/cpu_attn.py,
# CPUAttentionBackend.get_supported_head_sizes. Another size ends the server at its first request.
VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the checks resolved: where the model is, its sizes, how ranks are arranged and compute. planned:
    for other machines than this one.
    """

    config: RunConfig
    folder: Path
    spec: ModelSpec
    layout: Layout
    on_cpu: bool
    planned: bool


def check(config: RunConfig, *, planned: bool = False, deep: bool = False) -> Facts:
    """Refuse a run that cannot work. Starts nothing, reads the model's config.json and all of the data.
    `planned`: for other machines than this one, so run.device=cuda needs no GPU here. `deep`: also when the
    planned memory of GPUs does not suffice (planning/).
    """
    facts = check_training(config, planned=planned)
    for rule in (*RUN_RULES, *((gpus_have_room,) if deep else ())):
        rule(facts)
    return facts


def check_training(config: RunConfig, *, planned: bool = False) -> Facts:
    """Refuse a model, layout or option that cannot be trained here, whatever engines and data there are."""
    from megatron_dapo.weights.hf import resolve_folder

    check_settings(config)
    folder = resolve_folder(config.model.path)
    spec = read_model(folder)
    cpu = config.run.device != "cuda" if planned else on_cpu(config)
    rules.check_model(config, spec, on_cpu=cpu)
    layout = config.layout.to_layout()
    return Facts(config=config, folder=folder, spec=spec, layout=layout, on_cpu=cpu, planned=planned)


def check_settings(config: RunConfig) -> None:
    """Refuse fields that do not go together, whatever the model and the machine."""
    rules.check_settings(config)
    for rule in SETTING_RULES:
        rule(config)


def on_cpu(config: RunConfig) -> bool:
    """Whether ranks compute on the CPU. UserError when run.device=cuda cannot be had."""
    import torch

    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device=cuda but torch sees no GPU; use run.device=cpu or install the GPU stack "
            "(requirements.txt)"
        )
    return config.run.device == "cpu" or not torch.cuda.is_available()


def num_hosts() -> int:
    """Hosts of the run by torchrun's environment, all with as many ranks; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or 1


# --- between fields (those about the policy alone are in policy/rules.py)


def samples_divide_into_updates(config: RunConfig) -> None:
    """Every update of a full step has the same number of samples on every data-parallel rank."""
    layout, sampling = config.layout.to_layout(), config.sampling
    num_samples = sampling.prompts_per_step * sampling.samples_per_prompt
    if num_samples % (config.batch.updates_per_step * layout.dp):
        raise UserError(
            f"sampling.prompts_per_step x sampling.samples_per_prompt = {num_samples} samples do not divide "
            f"into "
            f"batch.updates_per_step={config.batch.updates_per_step} x layout.data_parallel={layout.dp}; "
            f"change one of the four"
        )


def window_is_not_empty(config: RunConfig) -> None:
    """Some group counts as informative."""
    sampling, (low, high) = config.sampling, config.sampling.bounds
    if low > high or (low == high and not sampling.inclusive):
        raise UserError(f"sampling.low={low} leaves nothing below sampling.high={high}; lower it")


def accuracies_lie_between_0_and_1(config: RunConfig) -> None:
    """A window of accuracies has its ends there."""
    sampling, (low, high) = config.sampling, config.sampling.bounds
    if sampling.metric == "accuracy" and not 0 <= low <= high <= 1:
        raise UserError(
            f"sampling.low={low} and sampling.high={high} are accuracies, from 0 to 1; change them, or set "
            f"sampling.metric to what they mean"
        )


def an_adaptive_window_is_of_accuracies(config: RunConfig) -> None:
    """It moves towards (0, 1)."""
    sampling = config.sampling
    if sampling.adaptive and sampling.metric != "accuracy":
        raise UserError(
            f"sampling.adaptive=true moves a window of accuracies, not of "
            f"sampling.metric={sampling.metric}; unset one of them"
        )


def cap_allows_a_step(config: RunConfig) -> None:
    """A step may sample at least the prompts that it trains on."""
    sampling = config.sampling
    if sampling.prompt_cap < sampling.prompts_per_step:
        raise UserError(
            f"sampling.max_prompts={sampling.max_prompts} is below "
            f"sampling.prompts_per_step={sampling.prompts_per_step}; raise it"
        )


def an_engine_holds_a_group(config: RunConfig) -> None:
    """All completions of a prompt are one request, and vLLM refuses one with more sequences than it runs at
    once.
    """
    for key, number in (
        ("sampling.samples_per_prompt", config.sampling.samples_per_prompt),
        ("evaluation.samples", config.evaluation.samples),
    ):
        if number > config.rollout.max_concurrency:
            raise UserError(
                f"{key}={number} exceeds rollout.max_concurrency={config.rollout.max_concurrency}, the "
                f"sequences that "
                "one engine runs at once; raise that or lower it"
            )


def seeds_suffice(config: RunConfig) -> None:
    """A seeded run has 2,048 seeds for the completions of each prompt (rollout/sample.py)."""
    largest = max(config.sampling.samples_per_prompt, config.evaluation.samples)
    if config.rollout.seeded and largest > 2048:
        raise UserError(
            f"rollout.seeded=true allows at most 2048 completions of a prompt, not {largest}; lower "
            "sampling.samples_per_prompt or evaluation.samples, or set rollout.seeded=false"
        )


def micro_batch_holds_the_longest_sample(config: RunConfig) -> None:
    """A sample is never cut, so one micro-batch must hold the longest, padded for context parallelism."""
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    padded = round_up(longest, config.layout.to_layout().sequence_multiple)
    if config.batch.max_tokens < padded:
        raise UserError(
            f"batch.max_tokens={config.batch.max_tokens} is below the longest possible sample, "
            f"data.max_prompt_tokens + "
            f"rollout.max_tokens = {longest}; raise it to at least {padded}"
        )


def verification_has_an_export(config: RunConfig) -> None:
    """run.verify_sync compares the engines with the exported checkpoint."""
    if config.run.verify_sync and not config.checkpoint.export_hf:
        raise UserError(
            "run.verify_sync=true compares with the exported checkpoint; set checkpoint.export_hf=true"
        )


def greedy_evaluation_samples_once(config: RunConfig) -> None:
    """Greedy completions of one prompt are all equal."""
    if config.evaluation.temperature == 0 and config.evaluation.samples > 1:
        raise UserError(
            f"evaluation.temperature=0 is greedy, so evaluation.samples={config.evaluation.samples} would "
            f"all be equal; set it to 1"
        )


def lower_mismatch_bound_is_for_masking(config: RunConfig) -> None:
    """Truncation knows no lower bound."""
    objective = config.objective
    if objective.mismatch_low is not None and objective.mismatch_correction != "mask":
        raise UserError(
            f"objective.mismatch_low={objective.mismatch_low} is for objective.mismatch_correction=mask, not "
            f"{objective.mismatch_correction}; set it to null or mask"
        )


def sleeping_engines_are_idle_and_colocated(config: RunConfig) -> None:
    """With an age, sampling goes on while the policy trains; elsewhere nobody needs their memory."""
    if config.rollout.sleep is True and not config.rollout.colocated:
        raise UserError(
            "rollout.sleep=true with rollout.colocated=false: the policy has no use for the memory of other "
            "hosts; set rollout.sleep=auto"
        )
    if config.rollout.sleep is True and config.sampling.max_age:
        raise UserError(
            f"rollout.sleep=true with sampling.max_age={config.sampling.max_age}: engines that sleep while "
            "the policy trains cannot sample meanwhile; set sampling.max_age=0 or rollout.sleep=auto"
        )


def enough_engines_are_started(config: RunConfig) -> None:
    """A run cannot need more living engines than it starts; how many join it is not known."""
    rollout, hosts = config.rollout, num_hosts()
    if rollout.colocated and rollout.min_engines > hosts * rollout.engines:
        raise UserError(
            f"rollout.min_engines={rollout.min_engines} exceeds rollout.engines={rollout.engines}"
            f"{f' on each of {hosts} hosts' if hosts > 1 else ''}, the engines that are started; lower it"
        )


# --- of a run: model, engines, data, verifier


def model_has_the_positions(facts: Facts) -> None:
    """The longest prompt and response fit into the model's context."""
    longest = facts.config.data.max_prompt_tokens + facts.config.rollout.max_tokens
    if longest > facts.spec.max_positions:
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_tokens = {longest} exceeds the model's "
            f"{facts.spec.max_positions} positions; lower one of them"
        )


def engines_split_the_heads(facts: Facts) -> None:
    """vLLM gives every tensor-parallel worker the same number of heads, and at least one key/value head."""
    rollout, spec = facts.config.rollout, facts.spec
    if rollout.tensor_parallel > spec.num_kv_heads or spec.num_heads % rollout.tensor_parallel:
        raise UserError(
            f"rollout.tensor_parallel={rollout.tensor_parallel} does not divide the model's "
            f"{spec.num_heads} heads "
            f"({spec.num_kv_heads} key/value heads); lower it"
        )


def engines_have_kernels_for_the_heads(facts: Facts) -> None:
    """vLLM's attention on the CPU has kernels for some head sizes only."""
    import torch

    head_dim = facts.spec.head_dim
    if facts.on_cpu and not torch.cuda.is_available() and head_dim not in VLLM_CPU_HEAD_SIZES:
        sizes = ", ".join(str(size) for size in VLLM_CPU_HEAD_SIZES)
        raise UserError(
            f"model.path={facts.folder}: head_dim={head_dim} is not supported by vLLM's CPU attention, which "
            f"has {sizes}; use another model, or a GPU"
        )


def engines_can_hold_fp8(facts: Facts) -> None:
    """rollout.quantization has rules of its own."""
    import torch

    from megatron_dapo.sync import fp8_engine_rules

    if facts.config.rollout.quantization is not None:
        on_gpu = not facts.on_cpu or torch.cuda.is_available()
        fp8_engine_rules.check(facts.config, facts.spec, facts.layout, on_gpu=on_gpu)


def servers_can_be_started(facts: Facts) -> None:
    """rollout.python, where it is set, has vLLM, and this package as its plugin."""
    from megatron_dapo.rollout.interpreter import check_interpreter

    if facts.config.rollout.python is not None and not facts.planned:
        check_interpreter(facts.config.rollout.python)


def deltas_suit_the_engines(config: RunConfig) -> None:
    """A delta is of 16-bit elements; where it does not pay, as with float32, it ends by itself."""
    if config.sync.delta and config.rollout.quantization:
        raise UserError(
            f"sync.delta=true is for engines in bf16, and rollout.quantization={config.rollout.quantization} "
            "sends scales that change with every element; unset one of them"
        )


def files_suffice(facts: Facts) -> None:
    """Rank 0 holds one connection per request in flight; it raises its own limit as far as the system lets
    it.
    """
    from megatron_dapo.rollout.client import file_descriptors_needed
    from megatron_dapo.rollout.files import check_file_limit

    check_file_limit(file_descriptors_needed(facts.config.rollout, num_hosts()))


def data_can_be_read(facts: Facts) -> None:
    """Every row has a prompt and an answer, and names no reward rule that cannot be loaded."""
    from megatron_dapo.reward.rules import load_rule

    timeout_s = facts.config.reward.timeout_s
    data_rules.files_can_be_read(facts.config, lambda name, where: load_rule(name, timeout_s, where))


def verifier_can_be_called(facts: Facts) -> None:
    """reward.verifier and reward.rules name rules that can be loaded."""
    from megatron_dapo.reward.rules import load_rule

    reward = facts.config.reward
    load_rule(reward.verifier, reward.timeout_s)
    for name in reward.rules:
        load_rule(name, reward.timeout_s, "reward.rules")


def ports_are_free(facts: Facts) -> None:
    """Nobody listens where the engines will."""
    from megatron_dapo.rollout.ports import checked_port

    rollout = facts.config.rollout
    if rollout.base_port is not None and rollout.colocated:
        for index in range(rollout.engines):
            checked_port(rollout.base_port, index)


def gpus_have_room(facts: Facts) -> None:
    """Every phase of a step fits into the GPUs' memory."""
    from megatron_dapo.planning.fits import memory_suffices

    if not facts.on_cpu:
        memory_suffices(facts.config, facts.spec)


SETTING_RULES: tuple[Callable[[RunConfig], None], ...] = (
    samples_divide_into_updates,
    window_is_not_empty,
    accuracies_lie_between_0_and_1,
    an_adaptive_window_is_of_accuracies,
    cap_allows_a_step,
    an_engine_holds_a_group,
    seeds_suffice,
    *reward_settings.SETTINGS,
    micro_batch_holds_the_longest_sample,
    verification_has_an_export,
    greedy_evaluation_samples_once,
    sleeping_engines_are_idle_and_colocated,
    *data_rules.SETTINGS,
    lower_mismatch_bound_is_for_masking,
    enough_engines_are_started,
    deltas_suit_the_engines,
)
RUN_RULES: tuple[Callable[[Facts], None], ...] = (
    model_has_the_positions,
    engines_split_the_heads,
    engines_have_kernels_for_the_heads,
    engines_can_hold_fp8,
    servers_can_be_started,
    files_suffice,
    data_can_be_read,
    checkpoints_have_room,
    verifier_can_be_called,
    ports_are_free,
)
