"""What differs between a policy on GPUs and one on CPUs, as a value: nothing else under policy/ asks which it
is.

On a GPU layers are TransformerEngine's, FP8 included, or Megatron's local ones (`policy.layers`); on a CPU
they are the local ones, with an emulation of FP8 (policy/local_layers.py, policy/cpu.py, policy/fp8.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed

from megatron_dapo.config import Fp8Config, PolicyConfig
from megatron_dapo.errors import UserError
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.policy import cpu, fp8_rules, local_layers
from megatron_dapo.policy.layer_choice import uses_transformer_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """CPU and GPU below are the only two.

    collectives: torch.distributed's backend. prepare(): before the process groups start, harmless when called
    again. device(): of this rank, after its GPU was set. seed(seed): Megatron's random state, before a model
    is built. layers(spec, policy, numbers, amax_group): Megatron's layer specification of a model chunk with
    these layers of the whole model. transformer_fields(spec, layout, policy): fields of Megatron's
    TransformerConfig. move_to_device(module): in place. fp8_in_megatron: FP8 is TransformerEngine's, which
    gradient buffers and optimizer must know of, and no emulation in the layers.
    """

    name: Literal["cpu", "gpu"]
    collectives: Literal["gloo", "nccl"]
    prepare: Callable[[], None]
    device: Callable[[], torch.device]
    seed: Callable[[int], None]
    layers: Callable[[ModelSpec, PolicyConfig, Sequence[int], Any], Any]
    transformer_fields: Callable[[ModelSpec, Layout, PolicyConfig], dict[str, Any]]
    move_to_device: Callable[[torch.nn.Module], object]
    fp8_in_megatron: bool

    def megatrons_fp8(self, policy: PolicyConfig) -> Fp8Config | None:
        """What Megatron's gradient buffers and optimizer are to know of FP8."""
        return policy.fp8 if self.fp8_in_megatron else None


def backend_of(on_cpu: bool) -> Backend:
    return CPU if on_cpu else GPU


def _cpu_fields(spec: ModelSpec, layout: Layout, policy: PolicyConfig) -> dict[str, Any]:
    """No CUDA kernels, no experts grouped into one kernel, no freeing of what a pipeline stage has sent."""
    return dict(
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        moe_grouped_gemm=False,
        deallocate_pipeline_outputs=False,
        # sends one at a time: with two stages, a batch could not tell the next stage's message from the
        # previous one's
        batch_p2p_comm=False,
        batch_p2p_sync=False,
    )


def _prepare_gpu() -> None:
    if not HAVE_TE:
        local_layers.do_without_transformer_engine()


def _gpu_layers(spec: ModelSpec, policy: PolicyConfig, numbers: Sequence[int], amax_group: Any) -> Any:
    if not uses_transformer_engine(policy):
        return local_layers.block_submodules(spec, policy, numbers, amax_group)
    if not HAVE_TE:
        raise UserError(
            f"policy.layers={policy.layers} takes TransformerEngine's layers, which cannot be imported; "
            "`python -c 'import transformer_engine.pytorch'` says why; mend it or set policy.layers=local"
        )
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=spec.num_experts or None,
        moe_grouped_gemm=spec.num_experts > 0,
        qk_layernorm=spec.qk_norm,
    )


def _gpu_fields(spec: ModelSpec, layout: Layout, policy: PolicyConfig) -> dict[str, Any]:
    from_te = uses_transformer_engine(policy)
    return dict(
        bias_activation_fusion=True,
        apply_rope_fusion=from_te,
        gradient_accumulation_fusion=False,
        moe_grouped_gemm=from_te and spec.num_experts > 0,
        deallocate_pipeline_outputs=True,
        batch_p2p_comm=layout.vpp is None,
        **fp8_rules.transformer_fields(policy.fp8),
    )


CPU = Backend(
    name="cpu",
    collectives="gloo",
    prepare=cpu.install,
    device=lambda: torch.device("cpu"),
    seed=lambda seed: initialize_rng_tracker(inference_rng_tracker=True),
    layers=local_layers.block_submodules,
    transformer_fields=_cpu_fields,
    move_to_device=lambda module: None,
    fp8_in_megatron=False,
)
GPU = Backend(
    name="gpu",
    collectives="nccl",
    prepare=_prepare_gpu,
    device=lambda: torch.device("cuda", torch.cuda.current_device()),
    seed=model_parallel_cuda_manual_seed,
    layers=_gpu_layers,
    transformer_fields=_gpu_fields,
    move_to_device=lambda module: module.cuda(),
    fp8_in_megatron=True,
)
