"""GPTModel from a Hugging Face configuration, with its weights read straight into this rank's shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_dapo.bridge.hf import DTYPES, CheckpointReader, HFModel
from megatron_dapo.bridge.names import EXPERT, row_of
from megatron_dapo.bridge.plan import padded_vocab, pieces
from megatron_dapo.config import PolicyConfig
from megatron_dapo.layout import Layout
from megatron_dapo.policy import cpu, fp8_rules
from megatron_dapo.policy.parallel import Place


class HeadlessGPT(GPTModel):
    """GPTModel that stops before its output layer: `algo/logprobs.py` multiplies by that, without making all the logits.

    The last stage returns hidden states [T, 1, H] of all tokens, entering the tensor-parallel region as they do in Megatron's
    ColumnParallelLinear: in backward each rank's share of their gradient is summed (and scattered, with sequence parallelism).
    """

    def _postprocess(self, hidden_states: torch.Tensor, **unused: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        for (
            hook
        ) in self.output_layer._forward_pre_hooks.values():  # waits for weights that policy.overlap_param_gather has on the way
            hook(self.output_layer, ())
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        return copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp)


def transformer_config(model: HFModel, layout: Layout, policy: PolicyConfig, dtype: str, on_cpu: bool) -> TransformerConfig:
    """Megatron's configuration of the model; the CPU differs only in switching off CUDA kernels and TransformerEngine's FP8."""
    compute = DTYPES[dtype]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_size,
        qk_layernorm=model.qk_norm,
        num_moe_experts=model.num_experts or None,
        moe_router_topk=model.experts_per_token or 2,
        moe_ffn_hidden_size=model.ffn_size if model.num_experts else None,
        moe_router_pre_softmax=not model.renormalize_experts,  # probabilities of all experts, or of the chosen ones alone
        moe_router_load_balancing_type="none",  # the objective is DAPO's alone
        moe_router_dtype="fp32",
        moe_grouped_gemm=model.num_experts > 0 and not on_cpu,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
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
        # sends one at a time: with two stages, a batch could not tell the next stage's message from the previous one's
        overlap_p2p_comm=layout.vpp is not None,
        batch_p2p_comm=not on_cpu and layout.vpp is None,
        recompute_granularity=policy.recompute,
        recompute_modules=list(policy.recompute_modules) if policy.recompute == "selective" else None,
        recompute_method="uniform" if policy.recompute == "full" else None,
        recompute_num_layers=policy.recompute_layers if policy.recompute == "full" else None,
        tp_comm_overlap=policy.overlap_tensor_parallel,
        **_device_options(policy, on_cpu),
    )


def _device_options(policy: PolicyConfig, on_cpu: bool) -> dict[str, Any]:
    if not on_cpu:
        fused = dict(bias_activation_fusion=True, apply_rope_fusion=True, gradient_accumulation_fusion=False)
        return fused | fp8_rules.transformer_fields(policy.fp8)
    return dict(
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        batch_p2p_sync=False,
    )


def build(
    model: HFModel, place: Place, policy: PolicyConfig, dtype: str, *, on_cpu: bool, distributed_optimizer: bool, seed: int
) -> list[DistributedDataParallel]:
    """This rank's model chunks (one, or several in an interleaved pipeline) inside Megatron's DistributedDataParallel; their
    weights are not set yet."""
    layout = place.layout
    config = transformer_config(model, layout, policy, dtype, on_cpu)
    if on_cpu:
        initialize_rng_tracker(inference_rng_tracker=True)
    else:
        model_parallel_cuda_manual_seed(seed)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=policy.overlap_grad_reduce,
        overlap_param_gather=policy.overlap_param_gather,
        **({} if on_cpu else fp8_rules.ddp_fields(policy.fp8)),
    )
    chunks = []
    for number in range(layout.vpp or 1):
        spec = _cpu_spec(model, place, policy, number) if on_cpu else _gpu_spec(model)
        gpt = _gpt_model(model, place, config, spec, number)
        for name, parameter in gpt.named_parameters():
            if EXPERT.search(name):  # at ep 1 Megatron would sum their gradients over the ranks that dense ones have in common
                parameter.allreduce = False  # type: ignore[attr-defined]
        if not on_cpu:
            gpt = gpt.cuda()
        module = Float16Module(config, gpt) if dtype == "bf16" else gpt
        # as in Megatron's own training: only the first chunk's gradients are worth cutting into buckets
        chunks.append(DistributedDataParallel(config, ddp, module, disable_bucketing=number > 0))
    if policy.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]  # type: ignore[assignment]
    return chunks


def _cpu_spec(model: HFModel, place: Place, policy: PolicyConfig, number: int) -> TransformerBlockSubmodules:
    """The layers of this rank's model chunk `number`. An interleaved pipeline deals chunks out to the stages in turn."""
    layout = place.layout
    per_chunk = model.num_layers // layout.num_stages
    first = (number * layout.pp + place.pp_rank) * per_chunk
    layers = [
        cpu.layer_spec(model, policy.fp8 if fp8_rules.is_quantized(policy.fp8, i, model.num_layers) else None, place.amax_group)
        for i in range(first, first + per_chunk)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=cpu.RMSNorm)  # type: ignore[arg-type]


def _gpu_spec(model: HFModel) -> Any:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=model.num_experts or None, moe_grouped_gemm=model.num_experts > 0, qk_layernorm=model.qk_norm
    )


def _gpt_model(model: HFModel, place: Place, config: TransformerConfig, spec: Any, number: int) -> HeadlessGPT:
    layout = place.layout
    return HeadlessGPT(
        config,
        spec,
        vocab_size=padded_vocab(model.vocab_size, layout.tp),
        max_sequence_length=model.max_positions,
        pre_process=place.is_first_stage and number == 0,
        post_process=place.is_last_stage and number == (layout.vpp or 1) - 1,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,  # type: ignore[arg-type]
        rope_scaling=model.rope_factor is not None,
        rope_scaling_factor=model.rope_factor or 1.0,
        vp_stage=number if layout.vpp else None,
    )


def unwrapped(chunk: torch.nn.Module) -> Any:
    """The HeadlessGPT inside Megatron's wrappers."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def output_weight(chunk: torch.nn.Module) -> torch.Tensor:
    """This rank's shard [V, H] of the output layer, on the last pipeline stage; the embedding's if they are tied and both here."""
    gpt = unwrapped(chunk)
    tied = gpt.share_embeddings_and_output_weights
    return gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight


def named_shards(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters by Megatron name, with global layer and expert numbers whatever the pipeline stage and the rank."""
    for chunk in chunks:
        gpt = unwrapped(chunk)
        yield from ((name, p) for name, p in gpt.named_parameters() if not name.startswith("decoder.layers."))
        for layer in gpt.decoder.layers:
            first = getattr(layer.mlp, "local_expert_indices", [0])[0]
            for name, parameter in layer.named_parameters():
                name = EXPERT.sub(lambda m, first=first: str(first + int(m.group())), name)
                yield f"decoder.layers.{layer.layer_number - 1}.{name}", parameter


def gather_weights(chunks: Iterable[DistributedDataParallel]) -> None:
    """With `policy.overlap_param_gather` a rank holds other ranks' updated weights only from its next forward pass on; call this
    before reading weights in any other way. Collective."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


@torch.no_grad()
def load_weights(chunks: Iterable[torch.nn.Module], folder: Path, model: HFModel, place: Place) -> None:
    """Fill every shard from the checkpoint, reading only the slices this rank holds. Vocabulary padding becomes zero."""
    reader = CheckpointReader(folder)
    for name, parameter in named_shards(chunks):
        shards = place.shards(expert=row_of(name).expert)
        found = pieces(name, model, tp=shards.size, tp_rank=shards.rank)
        shard = torch.zeros(parameter.shape, dtype=parameter.dtype)
        for piece in found:
            part = reader.read(piece.hf, piece.dim, piece.hf_start, piece.size)
            shard.narrow(piece.dim, piece.start, piece.size).copy_(part)
        parameter.copy_(shard)  # whole, because a parameter that TransformerEngine keeps in FP8 cannot be written in parts
        if hasattr(parameter, "get_high_precision_init_val"):  # TransformerEngine's: what the master weights start from
            parameter.get_high_precision_init_val = lambda shard=shard: shard
