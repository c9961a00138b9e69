"""GPTModel from a Hugging Face configuration, with its weights read straight into this rank's shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron_dapo.config import PolicyConfig
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.policy import fp8_rules
from megatron_dapo.policy.backend import Backend
from megatron_dapo.policy.session import Session
from megatron_dapo.weights.hf import DTYPES, CheckpointReader
from megatron_dapo.weights.names import EXPERT, row_of
from megatron_dapo.weights.slices import Shard, padded_vocab, slices_of


class HeadlessGPT(GPTModel):
    """GPTModel that stops before its output layer: `batching/logprobs.py` multiplies by that, without making
    all the logits.

    The last stage returns hidden states [T, 1, H] of all tokens, entering the tensor-parallel region as they
    do in Megatron's ColumnParallelLinear: in backward each rank's share of their gradient is summed (and
    scattered, with sequence parallelism).
    """

    def _postprocess(self, hidden_states: torch.Tensor, **unused: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())  # waits for weights that policy.overlap_param_gather has on the way
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        return copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp)


def transformer_config(
    spec: ModelSpec, layout: Layout, policy: PolicyConfig, dtype: str, backend: Backend
) -> TransformerConfig:
    """Megatron's configuration of the model; what depends on the device comes from the backend."""
    compute = DTYPES[dtype]
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn_size,
        qk_layernorm=spec.qk_norm,
        num_moe_experts=spec.num_experts or None,
        moe_router_topk=spec.experts_per_token or 2,
        moe_ffn_hidden_size=spec.ffn_size if spec.num_experts else None,
        # probabilities of all experts, or of the chosen ones alone
        moe_router_pre_softmax=not spec.renormalize_experts,
        moe_router_load_balancing_type="none",  # the objective's loss is the only one
        moe_router_dtype="fp32",
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
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
        overlap_p2p_comm=layout.vpp is not None,
        recompute_granularity=policy.recompute,
        recompute_modules=list(policy.recompute_modules) if policy.recompute == "selective" else None,
        recompute_method="uniform" if policy.recompute == "full" else None,
        recompute_num_layers=policy.recompute_layers if policy.recompute == "full" else None,
        **backend.transformer_fields(spec, layout, policy),
    )


def build(
    spec: ModelSpec,
    session: Session,
    policy: PolicyConfig,
    dtype: str,
    *,
    seed: int,
    kind: type[HeadlessGPT] = HeadlessGPT,
) -> list[MegatronModule]:
    """This rank's model chunks (several in an interleaved pipeline, else one), without their weights yet."""
    layout, backend = session.layout, session.backend
    config = transformer_config(spec, layout, policy, dtype, backend)
    backend.seed(seed)
    chunks: list[MegatronModule] = []
    for number in range(layout.vpp or 1):
        layers = backend.layers(spec, policy, _layer_numbers(spec, session, number), session.amax_group)
        gpt = _gpt_model(kind, spec, session, config, layers, number)
        for name, parameter in gpt.named_parameters():
            if EXPERT.search(name):
                # at ep 1 Megatron would sum their gradients over the ranks that dense ones have in common
                parameter.allreduce = False  # type: ignore[attr-defined]
        backend.move_to_device(gpt)
        chunks.append(Float16Module(config, gpt) if dtype == "bf16" else gpt)
    return chunks


def with_gradients(
    chunks: Sequence[MegatronModule], policy: PolicyConfig, backend: Backend, *, distributed_optimizer: bool
) -> list[DistributedDataParallel]:
    """The chunks in Megatron's DistributedDataParallel: fp32 gradient buffers, reduced over the replicas."""
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=policy.overlap_grad_reduce,
        overlap_param_gather=policy.overlap_param_gather,
        **fp8_rules.ddp_fields(backend.megatrons_fp8(policy)),
    )
    # as in Megatron's own training: only the first chunk's gradients are worth cutting into buckets
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    if policy.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]  # type: ignore[assignment]
    return wrapped


def _layer_numbers(spec: ModelSpec, session: Session, number: int) -> range:
    """The layers of this rank's model chunk `number`. An interleaved pipeline deals chunks out to the stages
    in turn.
    """
    layout = session.layout
    per_chunk = spec.num_layers // layout.num_stages
    first = (number * layout.pp + session.pp_rank) * per_chunk
    return range(first, first + per_chunk)


def _gpt_model(
    kind: type[HeadlessGPT],
    spec: ModelSpec,
    session: Session,
    config: TransformerConfig,
    layers: Any,
    number: int,
) -> HeadlessGPT:
    layout = session.layout
    return kind(
        config,
        layers,
        vocab_size=padded_vocab(spec.vocab_size, layout.tp),
        max_sequence_length=spec.max_positions,
        pre_process=session.is_first_stage and number == 0,
        post_process=session.is_last_stage and number == (layout.vpp or 1) - 1,
        share_embeddings_and_output_weights=spec.tied,
        position_embedding_type="rope",
        rotary_base=spec.rope_theta,  # type: ignore[arg-type]
        rope_scaling=spec.rope_factor is not None,
        rope_scaling_factor=spec.rope_factor or 1.0,
        vp_stage=number if layout.vpp else None,
    )


def unwrapped(chunk: torch.nn.Module) -> Any:
    """The HeadlessGPT inside Megatron's wrappers."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def output_weight(chunk: torch.nn.Module) -> torch.Tensor:
    """This rank's shard [V, H] of the output layer, on the last pipeline stage; the embedding's if they are
    tied and both here.
    """
    gpt = unwrapped(chunk)
    tied = gpt.share_embeddings_and_output_weights
    return gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight


def named_shards(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters by Megatron name, with global layer and expert numbers whatever the pipeline
    stage and the rank.
    """
    for chunk in chunks:
        gpt = unwrapped(chunk)
        yield from ((name, p) for name, p in gpt.named_parameters() if not name.startswith("decoder.layers."))
        for layer in gpt.decoder.layers:
            first = getattr(layer.mlp, "local_expert_indices", [0])[0]
            for name, parameter in layer.named_parameters():
                name = EXPERT.sub(lambda m, first=first: str(first + int(m.group())), name)
                yield f"decoder.layers.{layer.layer_number - 1}.{name}", parameter


def gather_weights(chunks: Iterable[DistributedDataParallel]) -> None:
    """With `policy.overlap_param_gather` a rank holds other ranks' updated weights only from its next forward
    pass on; call this before reading weights in any other way. Collective.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def drop_quantised_weights(chunks: Iterable[torch.nn.Module]) -> None:
    """Free TransformerEngine's quantised copies of the weights (policy.fp8); a forward pass makes them
    anew.
    """
    for chunk in chunks:
        for module in chunk.modules():
            getattr(module, "_fp8_workspaces", {}).clear()


@torch.no_grad()
def load_weights(
    chunks: Iterable[torch.nn.Module],
    folder: Path,
    spec: ModelSpec,
    session: Session,
    *,
    without: str | None = None,
) -> None:
    """Fill every shard but that of the parameter `without` from the checkpoint, reading only the slices this
    rank holds. Vocabulary padding becomes zero.
    """
    reader = CheckpointReader(folder)
    for name, parameter in named_shards(chunks):
        if name == without:
            continue
        shards = session.shards(expert=row_of(name).expert)
        shard = torch.zeros(parameter.shape, dtype=parameter.dtype)
        for part in slices_of(name, spec, tp=shards.size, tp_rank=shards.rank):
            values = reader.read(part.hf, part.dim, part.hf_start, part.size)
            shard.narrow(part.dim, part.start, part.size).copy_(values)
        # whole, because a parameter that TransformerEngine keeps in FP8 cannot be written in parts
        parameter.copy_(shard)
        if hasattr(parameter, "get_high_precision_init_val"):
            # TransformerEngine's: what the master weights start from
            parameter.get_high_precision_init_val = lambda shard=shard: shard


def held_shards(chunks: Iterable[torch.nn.Module], spec: ModelSpec, session: Session) -> list[Shard]:
    """All parameters of this rank, also those that other ranks hold as well."""
    shards = []
    for name, parameter in named_shards(chunks):
        split = session.shards(expert=row_of(name).expert)
        slices = slices_of(name, spec, tp=split.size, tp_rank=split.rank)
        shards.append(Shard(name=name, tensor=parameter, slices=tuple(slices)))
    return shards


def weight_shards(chunks: Iterable[torch.nn.Module], spec: ModelSpec, session: Session) -> list[Shard]:
    """The parameters that this rank contributes to a checkpoint: over all ranks every Hugging Face tensor
    once. The first replica contributes, one tensor-parallel rank what all of them have, and the first stage's
    copy of tied embeddings.
    """
    shards = []
    for name, parameter in named_shards(chunks):
        row = row_of(name)
        split = session.shards(expert=row.expert)
        if not split.first_replica or (row.split == "replicated" and split.rank > 0):
            continue
        if spec.tied and name == "output_layer.weight":
            continue
        slices = slices_of(name, spec, tp=split.size, tp_rank=split.rank)
        shards.append(Shard(name=name, tensor=parameter, slices=tuple(slices)))
    return shards
