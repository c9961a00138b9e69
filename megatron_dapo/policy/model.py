"""GPTModel from a Hugging Face configuration, with its weights read straight into this rank's shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_dapo.bridge.hf import DTYPES, CheckpointReader, HFModel
from megatron_dapo.bridge.plan import padded_vocab, pieces
from megatron_dapo.config import Fp8Config
from megatron_dapo.layout import Layout
from megatron_dapo.policy import cpu, fp8_rules
from megatron_dapo.policy.parallel import Place


def transformer_config(
    model: HFModel, layout: Layout, dtype: str, on_cpu: bool, fp8: Fp8Config | None = None
) -> TransformerConfig:
    """Megatron's configuration of the model; the CPU differs only in switching off CUDA kernels and TransformerEngine's FP8."""
    compute = DTYPES[dtype]
    cpu_options: dict[str, Any] = (
        dict(
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            persist_layer_norm=False,
            batch_p2p_comm=False,
            batch_p2p_sync=False,
        )
        if on_cpu
        else dict(bias_activation_fusion=True, apply_rope_fusion=True, gradient_accumulation_fusion=False)
        | fp8_rules.transformer_fields(fp8)
    )
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        pipeline_dtype=compute,
        params_dtype=compute,
        bf16=dtype == "bf16",
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        deallocate_pipeline_outputs=not on_cpu,
        **cpu_options,
    )


def build(
    model: HFModel,
    place: Place,
    dtype: str,
    *,
    on_cpu: bool,
    distributed_optimizer: bool,
    seed: int,
    fp8: Fp8Config | None = None,
) -> DistributedDataParallel:
    """This rank's model chunk inside Megatron's DistributedDataParallel; its weights are not set yet."""
    layout = place.layout
    config = transformer_config(model, layout, dtype, on_cpu, fp8)
    if on_cpu:
        initialize_rng_tracker(inference_rng_tracker=True)
        per_stage = model.num_layers // layout.pp
        layers = [
            cpu.layer_spec(fp8 if fp8_rules.is_quantized(fp8, number, model.num_layers) else None, place.amax_group)
            for number in range(place.pp_rank * per_stage, (place.pp_rank + 1) * per_stage)
        ]
        spec: Any = TransformerBlockSubmodules(layer_specs=layers, layer_norm=cpu.RMSNorm)  # type: ignore[arg-type]
    else:
        model_parallel_cuda_manual_seed(seed)
        spec = get_gpt_layer_with_transformer_engine_spec()
    gpt = GPTModel(
        config,
        spec,
        vocab_size=padded_vocab(model.vocab_size, layout.tp),
        max_sequence_length=model.max_positions,
        pre_process=place.is_first_stage,
        post_process=place.is_last_stage,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,  # type: ignore[arg-type]
        rope_scaling=model.rope_factor is not None,
        rope_scaling_factor=model.rope_factor or 1.0,
    )
    if not on_cpu:
        gpt = gpt.cuda()
    module = Float16Module(config, gpt) if dtype == "bf16" else gpt
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, **({} if on_cpu else fp8_rules.ddp_fields(fp8))
    )
    return DistributedDataParallel(config, ddp, module)


def named_shards(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters by Megatron name, with global layer numbers whatever the pipeline stage."""
    gpt: Any = chunk
    while hasattr(gpt, "module"):
        gpt = gpt.module
    number = {str(k): str(layer.layer_number - 1) for k, layer in enumerate(gpt.decoder.layers)}
    for name, parameter in gpt.named_parameters():
        yield re.sub(r"(?<=decoder\.layers\.)\d+", lambda m: number[m.group()], name), parameter


@torch.no_grad()
def load_weights(chunk: torch.nn.Module, folder: Path, model: HFModel, place: Place) -> None:
    """Fill every shard from the checkpoint, reading only the slices this rank holds. Vocabulary padding becomes zero."""
    reader = CheckpointReader(folder)
    for name, parameter in named_shards(chunk):
        found = pieces(name, model, tp=place.layout.tp, tp_rank=place.tp_rank)
        shard = torch.zeros(parameter.shape, dtype=parameter.dtype)
        for piece in found:
            part = reader.read(piece.hf, piece.dim, piece.hf_start, piece.size)
            shard.narrow(piece.dim, piece.start, piece.size).copy_(part)
        parameter.copy_(shard)  # whole, because a parameter that TransformerEngine keeps in FP8 cannot be written in parts
        if hasattr(
            parameter, "get_high_precision_init_val"
        ):  # TransformerEngine's: what the optimizer's master weights start from
            parameter.get_high_precision_init_val = lambda shard=shard: shard
