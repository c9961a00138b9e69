"""Megatron's optimizer and learning-rate schedule from OptimizerConfig. The schedule counts optimizer
updates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dapo.config import Fp8Config, OptimizerConfig
from megatron_dapo.policy import fp8_rules

_set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def _set_states_and_keep_step(self: DistributedOptimizer, model_param: Any, tensors: dict[str, Any]) -> None:
    """torch's AdamW counts its steps per parameter, and Megatron restores that count apart from the sharded
    state; 0.16 to 0.19 then miss it here. Keeping what was already restored makes a resharding load work
    without TransformerEngine or apex.
    """
    group, order = self.model_param_group_index_map[model_param]
    state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
    _set_states(self, model_param, {**tensors, "step": state["step"]} if "step" in state else tensors)


if USING_PYTORCH_OPTIMIZER:
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_states_and_keep_step


def build_optimizer(
    config: OptimizerConfig, chunks: list[Any], dtype: str, fp8: Fp8Config | None = None
) -> Any:
    """AdamW over this rank's parameters; bf16 keeps fp32 master weights. Call after the weights are loaded.

    `fp8` is TransformerEngine's on GPU; the CPU's emulation concerns no optimizer.
    """
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype == "bf16",
            params_dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
            use_distributed_optimizer=config.distributed,
            use_precision_aware_optimizer=config.cpu_offload > 0,  # whose code path offloading takes
            optimizer_cpu_offload=config.cpu_offload > 0,
            optimizer_offload_fraction=config.cpu_offload,
            overlap_cpu_optimizer_d2h_h2d=config.cpu_offload > 0,
            **fp8_rules.optimizer_fields(fp8),
        ),
        chunks,
    )
    if USING_PYTORCH_OPTIMIZER:
        _allocate_state(optimizer)
    return optimizer


def ready_gradients(optimizer: Any) -> float:
    """Hand the reduced gradients to the optimizer; returns their norm over all ranks, before clipping.
    Nothing is updated yet.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: Any, clip_grad: float, grad_norm: float) -> None:
    """The rest of Megatron's `optimizer.step`, which does not let anybody look at the norm in between: clip,
    AdamW, gather the parameters.
    """
    for part in _parts(optimizer):
        if clip_grad > 0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(
                parameters, clip_grad, grad_norm, part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            )
    optimizer.step_with_ready_grads()


def _parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _allocate_state(optimizer: Any) -> None:
    """Give torch's AdamW its state before the first step: Megatron can neither save nor load it otherwise."""
    for part in _parts(optimizer):
        offloaded = isinstance(part.optimizer, HybridDeviceOptimizer)
        for inner in part.optimizer.sub_optimizers if offloaded else [part.optimizer]:
            for parameter, state in _torch_states(inner):
                state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")} | {
                    "step": torch.zeros(())
                }
        if offloaded:
            part.optimizer._sync_sub_optimizers_state_to_hdo()


def load_optimizer(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Megatron's load, after which torch's AdamW counts the steps of every parameter on its own again:
    Megatron leaves one shared counter, which each update would advance once per parameter.
    """
    optimizer.load_state_dict(state_dict)
    if USING_PYTORCH_OPTIMIZER:
        for part in _parts(optimizer):
            for _, state in _torch_states(part.optimizer):
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).clone()


def _torch_states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, optimizer.state[parameter]


def build_schedule(config: OptimizerConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Linear warm-up to `lr` at update `warmup_updates`, then constant or cosine to `min_lr`."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_updates,
        lr_decay_steps=max(config.decay_updates or 0, config.warmup_updates + 1),
        lr_decay_style=config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
