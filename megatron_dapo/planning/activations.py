"""What a rank keeps between forward and backward, from the shapes alone.

A table of tensors for each kind of layer: TransformerEngine's, as its autograd functions save them, and the
CPU backend's, as torch does. Selective recomputation takes rows out, full recomputation leaves a layer's
input. The method is that of Korthikanti et al. (arXiv 2205.05198, section 4), without dropout, with
attention that keeps no scores, with a gated MLP, and with key/value heads that are fewer.

Legend: h hidden size, q and k sizes of all query and of all key/value heads, f MLP size, t tensor-parallel
size, s the same with sequence parallelism and 1 without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_dapo.config import PolicyConfig, RunConfig
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.planning.hardware import ASSUMED

FP32 = 4
LOGIT_BLOCKS = 5 * (64 << 20)  # what batching/logprobs.py has of logits at once, in fp32 and once in bf16


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that a layer keeps. per_token: its bytes for each token that the rank's micro-batch has (under
    context parallelism its own share). dropped_by: the modules of policy.recompute_modules without which it
    is kept.
    """

    name: str
    per_token: float
    dropped_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """rows(model, layout, bytes of an element): what each layer keeps, its input first. final_norm: how many
    tensors of the hidden size the norm behind the last layer keeps.
    """

    rows: Callable[[ModelSpec, Layout, int], tuple[Kept, ...]]
    final_norm: int


@functools.lru_cache(maxsize=1024)
def _gpu_rows(model: ModelSpec, layout: Layout, size: int) -> tuple[Kept, ...]:
    """TransformerEngine's: norms fused into the linear layers behind them, rotary embedding and SwiGLU in one
    kernel each, flash attention. Values are a view of the mixed projection, which keeps all of it.
    """
    h, q, k, t, s = _sizes(model, layout)
    attention = [
        Kept("layer input", size * h / s),
        Kept("normalised input", size * h / s),
        Kept("query, key, value", size * (q + 2 * k) / t),
        Kept("rotated query, key", size * (q + k) / t),
        Kept("attention output", size * q / t),
        Kept("softmax statistics", FP32 * model.num_heads / t, ("core_attn",)),
        Kept("MLP input", size * h / s),
    ]
    if model.qk_norm:
        attention.append(Kept("query, key before their norms", size * (q + k) / t))
    f = model.ffn_size
    if model.num_experts:
        rows = _expert_rows(model, layout)
        f = f / layout.etp
        return (
            *attention,
            Kept("normalised MLP input", size * h / s, ("layernorm",)),
            Kept("router", 4 * FP32 * model.num_experts / s, ("moe",)),
            Kept("expert input", size * rows * h, ("moe",)),
            Kept("expert gate, up", size * rows * 2 * f, ("moe",)),
            Kept("expert activation", size * rows * f, ("moe", "moe_act")),
        )
    return (
        *attention,
        Kept("normalised MLP input", size * h / s, ("mlp",)),
        Kept("gate, up", size * 2 * f / t, ("mlp",)),
        Kept("activation", size * f / t, ("mlp",)),
    )


def _cpu_rows(model: ModelSpec, layout: Layout, size: int) -> tuple[Kept, ...]:
    """The CPU backend's (policy/cpu.py): norms keep their input, the normalised values and their output;
    SwiGLU and rotary embedding are made of single operations; sequences are put side by side for attention.
    """
    h, q, k, t, s = _sizes(model, layout)
    attention = [
        Kept("layer input", size * h / s),
        Kept("normalised input, before and after its weight", size * 2 * h / s, ("layernorm",)),
        Kept("cosines and sines", size * 4 * model.head_dim),
        Kept("padded query, key, value and attention output", size * 2 * (q + k) / t),
        Kept("softmax statistics", FP32 * model.num_heads / t),
        Kept("attention output", size * q / t),
        Kept("MLP input", size * h / s),
        Kept("normalised MLP input, before and after its weight", size * 2 * h / s, ("layernorm",)),
    ]
    if model.qk_norm:
        attention.append(Kept("query, key, value, and around their norms", size * (3 * q + 3 * k) / t))
    f = model.ffn_size
    if model.num_experts:
        rows = _expert_rows(model, layout)
        f = f / layout.etp
        return (
            *attention,
            Kept("expert input", size * rows * h, ("moe",)),
            Kept("expert gate, up and three of the activation's", size * rows * 6 * f, ("moe",)),
        )
    return (*attention, Kept("gate, up and three of the activation's", size * 5 * f / t, ("mlp",)))


def _sizes(model: ModelSpec, layout: Layout) -> tuple[int, int, int, int, int]:
    split = layout.tp if layout.sp else 1
    return model.hidden_size, model.query_size, model.key_size, layout.tp, split


def _expert_rows(model: ModelSpec, layout: Layout) -> float:
    """Tokens that the busiest rank's experts receive for each token of a rank's micro-batch. Ranks that split
    an expert gather each other's.
    """
    mean = model.experts_per_token * layout.etp / (layout.tp if layout.sp else 1)
    return mean * (ASSUMED.busiest_experts if layout.ep > 1 else 1.0)


GPU_LAYERS = Layers(rows=_gpu_rows, final_norm=1)
CPU_LAYERS = Layers(rows=_cpu_rows, final_norm=2)


# --- of a layer, a model chunk, a rank --------------------------------------------------


def kept_per_token(rows: Sequence[Kept], policy: PolicyConfig) -> float:
    """Bytes that a layer keeps for a token."""
    if policy.recompute == "full":
        return rows[0].per_token / policy.recompute_layers
    return sum(row.per_token for row in rows if not _is_dropped(row, policy))


def recomputed_per_token(rows: Sequence[Kept], policy: PolicyConfig) -> float:
    """Bytes for a token that exist again while a layer's backward pass runs."""
    if policy.recompute == "full":
        return policy.recompute_layers * sum(row.per_token for row in rows)
    return sum(row.per_token for row in rows if _is_dropped(row, policy))


def _is_dropped(row: Kept, policy: PolicyConfig) -> bool:
    return policy.recompute == "selective" and bool({*row.dropped_by} & {*policy.recompute_modules})


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes of one rank at the worst moment. kept: between forward and backward, of all micro-batches in
    flight. backward: what is recomputed, and the gradients of one layer. forward: of one layer in a pass
    without backward. logprobs, logprobs_forward: buffers around the output layer with and without backward,
    on the last stage. in_flight: layers of one micro-batch that are kept.
    """

    kept: float
    backward: float
    forward: float
    logprobs: float
    logprobs_forward: float
    in_flight: int


def rank_activations(
    config: RunConfig,
    model: ModelSpec,
    stage: int,
    *,
    micro_batches: int,
    layers: Layers = GPU_LAYERS,
) -> Activations:
    """On a rank of the stage, in an update of so many micro-batches of batch.max_tokens tokens, all of which
    predict a trained one.
    """
    layout, size = config.layout.to_layout(), 2 if config.model.dtype == "bf16" else 4
    tokens = config.batch.max_tokens / layout.cp
    rows = layers.rows(model, layout, size)
    per_chunk = model.num_layers // layout.num_stages
    h, split, is_last = model.hidden_size, layout.tp if layout.sp else 1, stage == layout.pp - 1
    # the final norm's input, and the hidden states that the output layer multiplies
    head = tokens * size * h * (1 + layers.final_norm / split) if is_last else 0.0
    chunk = tokens * per_chunk * kept_per_token(rows, config.policy)
    held = in_flight(layout, stage, min(micro_batches, 4 * layout.pp))
    widest = max(row.per_token for row in rows)
    gathered = 2 * size * h if layout.sp else 0  # input and its gradient, of all tensor-parallel ranks
    return Activations(
        kept=max(chunks * chunk + heads * head for chunks, heads in held),
        backward=tokens * (recomputed_per_token(rows, config.policy) + 2 * widest + gathered),
        forward=tokens * sum(row.per_token for row in rows),
        logprobs=_logprobs(tokens, model, layout, size, backward=True) if is_last else 0.0,
        logprobs_forward=_logprobs(tokens, model, layout, size, backward=False) if is_last else 0.0,
        in_flight=per_chunk * max(chunks for chunks, _ in held),
    )


def _logprobs(tokens: float, model: ModelSpec, layout: Layout, size: int, *, backward: bool) -> float:
    """Around batching/logprobs.py: forward has the hidden states of all tokens, which Megatron's
    Float16Module copies to fp32, and those of the trained ones, gathered in fp32. Backward has the scaled
    hidden states, their gradient in fp32 for the trained ones and for all, and the gradient of this rank's
    rows of the output layer.
    """
    hidden = tokens * model.hidden_size
    copies = size + (2 * FP32 if size < FP32 else 0)
    if not backward:
        return hidden * copies + LOGIT_BLOCKS
    weight = -(-model.vocab_size // layout.tp) * model.hidden_size
    return hidden * (size + 2 * FP32) + weight * size + LOGIT_BLOCKS


def schedule(layout: Layout, stage: int, micro_batches: int) -> Iterator[tuple[bool, int]]:
    """(forward?, model chunk) in the order in which a stage of Megatron's pipeline runs them: 1F1B, or
    interleaved (megatron/core/pipeline_parallel/schedules.py, get_pp_rank_microbatches).
    """
    chunks = layout.vpp or 1
    total = micro_batches * chunks
    behind = layout.pp - stage - 1
    warm_up = min(2 * behind + (chunks - 1) * layout.pp if layout.vpp else behind, total)

    def chunk(number: int) -> int:
        return number % (layout.pp * chunks) // layout.pp if layout.vpp else 0

    for number in range(total + warm_up):
        if number < total:
            yield True, chunk(number)
        if number >= warm_up:
            yield False, chunks - 1 - chunk(number - warm_up)


@functools.lru_cache(maxsize=4096)
def in_flight(layout: Layout, stage: int, micro_batches: int) -> frozenset[tuple[int, int]]:
    """(model chunks that are kept between forward and backward, how many of them are the stage's last), as
    often as a stage has them at once, where neither is below that of another moment.
    """
    last, kept, heads = (layout.vpp or 1) - 1, 0, 0
    moments = set()
    for forward, chunk in schedule(layout, stage, micro_batches):
        kept += 1 if forward else -1
        heads += (1 if forward else -1) * (chunk == last)
        moments.add((kept, heads))
    return frozenset(
        (k, h) for k, h in moments if not any(a >= k and b >= h and (a, b) != (k, h) for a, b in moments)
    )
