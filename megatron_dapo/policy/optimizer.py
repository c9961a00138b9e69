"""Megatron's optimizer and learning-rate schedule from OptimizerConfig. The schedule counts optimizer
updates.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dapo.config import Fp8Config, OptimizerConfig
from megatron_dapo.policy import fp8_rules


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
        allocate_state(optimizer)
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
    for part in optimizer_parts(optimizer):
        if clip_grad > 0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(
                parameters, clip_grad, grad_norm, part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            )
    optimizer.step_with_ready_grads()


def optimizer_parts(optimizer: Any) -> list[Any]:
    """Megatron's optimizers, of which there are several where experts have one of their own."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def allocate_state(optimizer: Any) -> None:
    """Give AdamW the state that its first step would make: a checkpoint can neither be saved nor loaded
    without it.
    """
    for part in optimizer_parts(optimizer):
        for inner in _adams(part):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    if not inner.state[parameter]:
                        inner.state[parameter] |= {
                            name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")
                        }
                        if isinstance(inner, torch.optim.AdamW):
                            inner.state[parameter]["step"] = torch.zeros(())
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_sub_optimizers_state_to_hdo()


def set_steps(optimizer: Any, num_updates: int) -> None:
    """AdamW has made `num_updates` steps, which its bias correction counts: torch's by parameter,
    TransformerEngine's by group.
    """
    for part in optimizer_parts(optimizer):
        for inner in _adams(part):
            if isinstance(inner, torch.optim.AdamW):
                for state in inner.state.values():
                    state["step"].fill_(num_updates)
            else:
                for group in inner.param_groups:
                    group["step"] = num_updates


def _adams(part: Any) -> list[torch.optim.Optimizer]:
    """The AdamWs of one of Megatron's optimizers: optimizer.cpu_offload has several, on GPU and host."""
    if getattr(part, "is_stub_optimizer", False):
        return []
    offloaded = isinstance(part.optimizer, HybridDeviceOptimizer)
    return part.optimizer.sub_optimizers if offloaded else [part.optimizer]


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
