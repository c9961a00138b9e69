"""What the policy cannot represent or compute, as small named rules that need no process group.

`preflight` includes all of them, and `Policy` calls `check` first thing: whoever builds a policy by another
way than a run gets the same refusal, in the same words. Nothing of Megatron is imported here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import ModelSpec, read_model
from megatron_dapo.policy import fp8_rules, layer_choice
from megatron_dapo.weights.hf import resolve_folder


def check(config: RunConfig, spec: ModelSpec, *, on_cpu: bool) -> None:
    """Every rule of this file. UserError names the fields, their values, the rule and the remedy."""
    check_settings(config)
    check_model(config, spec, on_cpu=on_cpu)


def check_settings(config: RunConfig) -> None:
    """The rules that need no model."""
    for rule in SETTINGS:
        rule(config)


def check_model(config: RunConfig, spec: ModelSpec, *, on_cpu: bool) -> None:
    """The rules about this model on this kind of device."""
    for rule in MODEL:
        rule(config, spec, on_cpu)


# --- between fields


def ranks_form_a_layout(config: RunConfig) -> None:
    """Expert, virtual and sequence parallel sizes fit the others; layout.Layout refuses what does not."""
    config.layout.to_layout()


def gathers_overlap_with_reduced_gradients(config: RunConfig) -> None:
    """Megatron's overlapped parameter gather builds on the overlapped reduction and the sharded optimizer."""
    policy = config.policy
    if policy.overlap_param_gather and not (policy.overlap_grad_reduce and config.optimizer.distributed):
        raise UserError(
            "policy.overlap_param_gather=true needs policy.overlap_grad_reduce=true and "
            "optimizer.distributed=true; set both or drop it"
        )


def pairs_are_trained_in_one_update(config: RunConfig) -> None:
    """The weights of a pair's tokens are those of before the update (objectives/dpo.py)."""
    updates = config.batch.updates_per_step
    if config.objective.kind == "dpo" and updates > 1:
        raise UserError(
            f"batch.updates_per_step={updates} does not go with objective.kind=dpo, whose gradient is exact "
            "for one update of a step; set it to 1 and sampling.prompts_per_step lower"
        )


def cosine_has_an_end(config: RunConfig) -> None:
    """A cosine decay needs the number of updates it takes."""
    if config.optimizer.decay == "cosine" and config.optimizer.decay_updates is None:
        raise UserError(
            "optimizer.decay=cosine needs optimizer.decay_updates, the number of updates over which it decays"
        )


def offload_has_master_weights(config: RunConfig) -> None:
    """Only the sharded fp32 master weights of bf16 parameters can be offloaded."""
    if config.optimizer.cpu_offload and not (config.model.dtype == "bf16" and config.optimizer.distributed):
        raise UserError(
            f"optimizer.cpu_offload={config.optimizer.cpu_offload} needs model.dtype=bf16 and "
            f"optimizer.distributed=true: Megatron "
            "offloads the sharded fp32 master weights of bf16 parameters; set both, or cpu_offload to 0"
        )


def fp8_scales_are_of_all_layers(config: RunConfig) -> None:
    """Delayed scales are updated for all layers at once, so no layer can be left out."""
    fp8 = config.policy.fp8
    if fp8 is not None and fp8.recipe == "delayed" and fp8.first_last_bf16:
        raise UserError(
            "policy.fp8.first_last_bf16=true does not work with policy.fp8.recipe=delayed, whose scales are "
            "updated for all layers "
            "at once; use another recipe or set it to false"
        )


def fp8_weights_have_masters(config: RunConfig) -> None:
    """Weights kept in FP8 are quantised from the distributed optimizer's fp32 masters of bf16 weights."""
    fp8, optimizer = config.policy.fp8, config.optimizer
    if fp8 is None or not fp8.param_gather:
        return
    if not optimizer.distributed:
        raise UserError(
            "policy.fp8.param_gather=true needs optimizer.distributed=true, which is what gathers parameters"
        )
    if config.model.dtype != "bf16":
        raise UserError(
            f"policy.fp8.param_gather=true needs model.dtype=bf16, not {config.model.dtype}: fp32 weights "
            f"have no master copy to "
            "quantise from"
        )
    if fp8.recipe != "delayed" and optimizer.cpu_offload:
        raise UserError(
            f"policy.fp8.param_gather=true with policy.fp8.recipe={fp8.recipe} does not work with "
            f"optimizer.cpu_offload="
            f"{optimizer.cpu_offload}: Megatron has no bf16 shards to update; set one of them to "
            f"false or 0"
        )


# --- of this model, on this kind of device


def layout_splits_the_model(config: RunConfig, spec: ModelSpec, on_cpu: bool) -> None:
    """Heads, sizes, experts and layers divide over the ranks. Megatron would train another model instead."""
    config.layout.to_layout().check_model(
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        hidden_size=spec.hidden_size,
        ffn_size=spec.ffn_size,
        num_experts=spec.num_experts,
    )


def recomputed_layers_fill_a_chunk(config: RunConfig, spec: ModelSpec, on_cpu: bool) -> None:
    """Full recomputation takes the layers of a stage's chunk in equal parts."""
    policy = config.policy
    per_chunk = spec.num_layers // config.layout.to_layout().num_stages
    if policy.recompute == "full" and per_chunk % policy.recompute_layers:
        raise UserError(
            f"policy.recompute_layers={policy.recompute_layers} does not divide the {per_chunk} layers of a "
            f"pipeline stage's "
            f"chunk; use one of {[d for d in range(1, per_chunk + 1) if per_chunk % d == 0]}"
        )


def reference_has_the_same_tokens(config: RunConfig, spec: ModelSpec, on_cpu: bool) -> None:
    """Log-probabilities of two models can be compared token by token."""
    if (path := config.objective.reference) is None:
        return
    try:
        vocab_size = read_model(resolve_folder(path)).vocab_size
    except UserError as error:
        raise UserError(f"objective.reference={path} cannot be used: {error}") from error
    if vocab_size != spec.vocab_size:
        raise UserError(
            f"objective.reference={path} has a vocabulary of {vocab_size} tokens, "
            f"model.path={config.model.path} one of {spec.vocab_size}; use a model with the same tokenizer"
        )


def layers_can_be_made(config: RunConfig, spec: ModelSpec, on_cpu: bool) -> None:
    """TransformerEngine's layers need it, and a GPU."""
    if config.policy.layers != "te":
        return
    if on_cpu:
        raise _needs_gpu("policy.layers", "te")
    is_planned_for_elsewhere = not torch.cuda.is_available()
    if not is_planned_for_elsewhere and not layer_choice.has_transformer_engine():
        raise UserError(
            "policy.layers=te needs TransformerEngine, which is not installed; pip install "
            "'transformer-engine[pytorch]>=2.9' (requirements.txt) or set policy.layers=local"
        )


def attention_knows_the_type(config: RunConfig, spec: ModelSpec, on_cpu: bool) -> None:
    """TransformerEngine's attention over packed sequences has kernels for 16 bits alone."""
    if config.model.dtype == "fp32" and not on_cpu and layer_choice.uses_transformer_engine(config.policy):
        raise UserError(
            f"model.dtype=fp32 does not go with policy.layers={config.policy.layers} on a GPU: "
            "TransformerEngine's attention over packed sequences computes in 16 bits alone; set "
            "model.dtype=bf16 or policy.layers=local"
        )


def recomputed_expert_activations_are_grouped(config: RunConfig, spec: ModelSpec, on_cpu: bool) -> None:
    """Recomputing the experts' activation function is a matter of TransformerEngine's grouped experts."""
    policy = config.policy
    if "moe_act" not in policy.recompute_modules:
        return
    if on_cpu:
        raise _needs_gpu("policy.recompute_modules", policy.recompute_modules)
    if policy.layers == "local" or (torch.cuda.is_available() and not layer_choice.has_transformer_engine()):
        raise UserError(
            f"policy.recompute_modules={policy.recompute_modules}: moe_act needs TransformerEngine's layers, "
            f"and policy.layers={policy.layers} gives the local ones here; use moe"
        )


def recomputed_experts_exist(config: RunConfig, spec: ModelSpec, on_cpu: bool) -> None:
    """The modules to recompute are modules of this model."""
    modules = config.policy.recompute_modules
    if not spec.num_experts and {"moe", "moe_act"} & set(modules):
        raise UserError(
            f"policy.recompute_modules={modules}: moe and moe_act need a model with experts; take them out"
        )


def recomputation_frees_something(config: RunConfig, spec: ModelSpec, on_cpu: bool) -> None:
    """Attention keeps no scores, and norms are fused into what follows them but in the local layers and
    before experts.
    """
    policy, of_mlp = config.policy, ["moe", "moe_act"] if spec.num_experts else ["mlp"]
    norms_too = spec.num_experts or on_cpu or not layer_choice.uses_transformer_engine(policy)
    useful = [*of_mlp, "layernorm"] if norms_too else of_mlp
    if policy.recompute == "selective" and not {*useful} & {*policy.recompute_modules}:
        raise UserError(
            f"policy.recompute_modules={policy.recompute_modules} would free no memory in this model; name "
            f"{' or '.join(useful)}, or set policy.recompute=null"
        )


def fp8_fits_model_and_device(config: RunConfig, spec: ModelSpec, on_cpu: bool) -> None:
    """Weight shards divide into the recipe's blocks, and GPU, CUDA and TransformerEngine know the recipe."""
    if config.policy.fp8 is not None:
        if config.policy.layers == "local" and not on_cpu:
            raise UserError(
                "policy.fp8 on a GPU needs TransformerEngine's layers, and policy.layers=local has none; set "
                "policy.layers=auto, policy.fp8=null, or run.device=cpu to emulate it"
            )
        layout = config.layout.to_layout()
        fp8_rules.check(config.policy.fp8, spec, layout, config.model.dtype, on_cpu=on_cpu)


def _needs_gpu(key: str, value: object) -> UserError:
    return UserError(f"{key}={value} needs a GPU and run.device=cpu has none; drop it for runs on the CPU")


SETTINGS: tuple[Callable[[RunConfig], None], ...] = (
    ranks_form_a_layout,
    gathers_overlap_with_reduced_gradients,
    pairs_are_trained_in_one_update,
    cosine_has_an_end,
    offload_has_master_weights,
    fp8_scales_are_of_all_layers,
    fp8_weights_have_masters,
)
MODEL: tuple[Callable[[RunConfig, ModelSpec, bool], None], ...] = (
    layout_splits_the_model,
    recomputed_layers_fill_a_chunk,
    reference_has_the_same_tokens,
    layers_can_be_made,
    attention_knows_the_type,
    recomputed_expert_activations_are_grouped,
    recomputed_experts_exist,
    recomputation_frees_something,
    fp8_fits_model_and_device,
)
