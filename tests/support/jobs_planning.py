"""What the planner predicts, measured: a rank's parameters, gradient buffers and optimizer state in
Megatron's objects, and the bytes that autograd keeps in a forward pass. One process plays any rank: its
collectives are torch's fake ones, and its own tensors are real.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_dapo.config import RunConfig
from megatron_dapo.layout import Coordinates
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.planning.build import built_sizes, fake_rank, fake_session
from megatron_dapo.policy import backend
from megatron_dapo.policy import model as model_file
from megatron_dapo.policy.forward import MicroBatch, response_logprobs, run_model
from megatron_dapo.policy.optimizer import build_optimizer, optimizer_parts


def small_model(**changes: Any) -> ModelSpec:
    sizes = dict(num_layers=8, hidden_size=256, num_heads=8, num_kv_heads=4, head_dim=48, ffn_size=640)
    rope = dict(rope_theta=1e4, rope_factor=None, max_positions=4096, norm_eps=1e-6)
    flags = dict(tied=False, qkv_bias=True, vocab_size=1001, eos_token_ids=(1,))
    return ModelSpec(**(dict(architecture="none") | sizes | rope | flags | changes))  # type: ignore[arg-type]


def config_of(overrides: list[str]) -> RunConfig:
    return RunConfig.load(None, ["model.path=none", *overrides])


def measure(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each {changes, overrides}: sizes of every stage's first rank as built on meta, and as built for
    real where the case says `real`; kept: bytes that the last stage's first rank keeps for backward.
    """
    backend.CPU.prepare()
    found = []
    for case in cases:
        config, model = config_of(case["overrides"]), small_model(**case["changes"])
        sizes = built_sizes(config, model, range(config.layout.pipeline_parallel))
        result: dict[str, Any] = {"built": [[s.elements, s.weights, s.gradients, s.optimizer] for s in sizes]}
        if case.get("real"):
            result |= _real(config, model)
        found.append(result)
    return found


def _real(config: RunConfig, model: ModelSpec) -> dict[str, Any]:
    layout = config.layout.to_layout()
    stage = layout.pp - 1
    with fake_rank(layout, layout.rank(Coordinates(tp=0, cp=0, dp=0, pp=stage))):
        session = fake_session(layout, stage, backend.CPU)
        from megatron.core import parallel_state

        session.tp_rank, session.tp_group = 0, parallel_state.get_tensor_model_parallel_group()
        session.cp_group = parallel_state.get_context_parallel_group()
        (bare,) = model_file.build(model, session, config.policy, config.model.dtype, seed=0)
        kept = _kept(bare, config, model, session)
        chunks = model_file.with_gradients(
            [bare], config.policy, backend.CPU, distributed_optimizer=config.optimizer.distributed
        )
        optimizer = build_optimizer(config.optimizer, chunks, config.model.dtype)
        states = [s for part in optimizer_parts(optimizer) for s in part.optimizer.state.values()]
        tensors = [t for state in states for t in state.values() if t.dim()]
        wrapped: Any = chunks[0]
        buffers = [b.grad_data for b in (*wrapped.buffers, *wrapped.expert_parallel_buffers)]
        return {
            "kept": kept,
            "parameters": sum(p.numel() * p.element_size() for _, p in model_file.named_shards([bare])),
            "gradients": sum(b.numel() * b.element_size() for b in buffers),
            "moments": sum(t.numel() * t.element_size() for t in tensors),
        }


def _kept(chunk: Any, config: RunConfig, model: ModelSpec, session: Any) -> int:
    """Every storage once, parameters left out."""
    tokens, layout = config.batch.max_tokens, session.layout
    own = {p.untyped_storage()._cdata for _, p in model_file.named_shards([chunk])}
    kept: dict[int, Any] = {}  # holding the storages, so that no number is given twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    if not session.is_first_stage:
        rows = tokens // (layout.tp if layout.sp else 1)
        arriving = torch.zeros(rows, 1, model.hidden_size, requires_grad=True)
        model_file.unwrapped(chunk).set_input_tensor(arriving)
    micro = _micro_batch(tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = run_model(chunk, micro, session)
        weight = model_file.output_weight(chunk)
        response_logprobs(hidden, weight, micro, session, vocab_size=model.vocab_size, temperature=1.0)
    return sum(storage.nbytes() for storage in kept.values())


def _micro_batch(tokens: int) -> MicroBatch:
    """Two sequences, all of whose tokens are trained."""
    whole, real = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens)
    return MicroBatch(
        tokens_1T=whole[None],
        positions_1T=torch.arange(tokens)[None],
        bounds=torch.tensor([0, tokens // 2, tokens], dtype=torch.int32),
        max_length=tokens // 2,
        num_samples=2,
        rows_R=torch.arange(tokens),
        labels_R=whole,
        advantages_R=real,
        streams_R={},
        fresh_R=whole.bool(),
        samples_R=whole,
        flat_R=whole,
    )
