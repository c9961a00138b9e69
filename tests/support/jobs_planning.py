"""What the planner predicts, measured: a rank's parameters, gradient buffers and optimizer state in
Megatron's objects, and the bytes that autograd keeps in a forward pass. One process plays any rank: its
collectives are torch's fake ones, and its own tensors are real.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch

from megatron_dapo.config import RunConfig
from megatron_dapo.layout import Coordinates
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.planning.build import build_ranks, fake_rank, fake_session
from megatron_dapo.planning.passes import SavedTensors
from megatron_dapo.planning.sizes import Sizes
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
    """For each {changes, overrides}: sizes of every stage's first rank as built on meta, of the policy and of
    a value model, and what it keeps there of a micro-batch; the same as built for real where the case says
    `real`, where kept is of the last stage's first rank.
    """
    backend.CPU.prepare()
    found = []
    for case in cases:
        config, model = config_of(case["overrides"]), small_model(**case["changes"])
        ranks = build_ranks(config, model)
        result: dict[str, Any] = {
            "built": [_numbers(rank.sizes) for rank in ranks],
            "value": [rank.value and _numbers(rank.value) for rank in ranks],
            "one_pass": [rank.one_pass and dataclasses.asdict(rank.one_pass) for rank in ranks],
        }
        if case.get("real"):
            result |= _real(config, model)
        found.append(result)
    return found


def passes_of_te(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each {changes, overrides}: what the first rank of the first and of the last stage keeps of a
    micro-batch on meta tensors, with the stand-in of TransformerEngine, which must be on sys.path.
    """
    _pretend_that_meta_is_cuda()
    found = []
    for case in cases:
        config, model = config_of(case["overrides"]), small_model(**case["changes"])
        ends = sorted({0, config.layout.pipeline_parallel - 1})
        ranks = build_ranks(config, model, ends, of=backend.GPU)
        passes = (rank.one_pass for rank in ranks)
        found.append({end: one and dataclasses.asdict(one) for end, one in zip(ends, passes, strict=True)})
    return found


def _pretend_that_meta_is_cuda() -> None:
    from megatron.core.tensor_parallel import random

    from support import pretend_cuda

    pretend_cuda.CPU = torch.device("meta")
    pretend_cuda._pretend_device()
    random._get_cuda_rng_state = torch.cuda.get_rng_state
    random._set_cuda_rng_state = torch.cuda.set_rng_state
    pretend_cuda._CudaMeansCpu().__enter__()
    attention = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention")
    # shapes alone, and no mask of all tokens by all tokens
    attention._attend = lambda q, k, v, *others: q + (k.sum() + v.sum())


def _numbers(sizes: Sizes) -> list[int]:
    return [sizes.elements, sizes.weights, sizes.gradients, sizes.optimizer, sizes.quantized]


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
    tokens, layout = config.batch.max_tokens, session.layout
    if not session.is_first_stage:
        rows = tokens // (layout.tp if layout.sp else 1)
        arriving = torch.zeros(rows, 1, model.hidden_size, requires_grad=True)
        model_file.unwrapped(chunk).set_input_tensor(arriving)
    micro = _micro_batch(tokens)
    with SavedTensors(p for _, p in model_file.named_shards([chunk])) as saved:
        hidden = run_model(chunk, micro, session)
        weight = model_file.output_weight(chunk)
        response_logprobs(hidden, weight, micro, session, vocab_size=model.vocab_size, temperature=1.0)
    return saved.num_bytes


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
