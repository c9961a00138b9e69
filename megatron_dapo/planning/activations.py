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

from megatron_dapo.config import Fp8Config, PolicyConfig, RunConfig
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.planning.hardware import ASSUMED
from megatron_dapo.planning.sizes import quantized_layers

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
    """rows(model, layout, bytes of an element, of one that a layer in FP8 keeps or None): what each layer
    keeps, its input first. final_norm(bytes of an element): for an element of the hidden size, what the norm
    behind the last layer keeps.
    """

    rows: Callable[[ModelSpec, Layout, int, float | None], tuple[Kept, ...]]
    final_norm: Callable[[int], int]


@functools.lru_cache(maxsize=1024)
def _gpu_rows(model: ModelSpec, layout: Layout, size: int, fp8: float | None = None) -> tuple[Kept, ...]:
    """TransformerEngine's: norms fused into the linear layers behind them, rotary embedding and SwiGLU in one
    kernel each, flash attention. Values are a view of the mixed projection, which keeps all of it. In FP8 a
    linear layer keeps its input as it was multiplied; what attention has returned is kept beside that.
    """
    h, q, k, t, s = _sizes(model, layout)
    of_input = size if fp8 is None else fp8
    attention = [
        Kept("layer input", size * h / s),
        Kept("normalised input", of_input * h / s),
        Kept("query, key, value", size * (q + 2 * k) / t),
        Kept("rotated query, key", size * (q + k) / t),
        Kept("attention output", size * q / t, () if fp8 is None else ("core_attn",)),
        Kept("softmax statistics", FP32 * model.num_heads / t, ("core_attn",)),
        Kept("MLP input", size * h / s),
    ]
    if model.qk_norm:
        attention.append(Kept("query, key before their norms", size * (q + k) / t))
    if fp8 is not None:
        attention.append(Kept("attention output in FP8", fp8 * q / t))
    f = model.ffn_size
    if model.num_experts:
        rows = _expert_rows(model, layout)
        f = f / layout.etp
        return (
            *attention,
            Kept("normalised MLP input", size * h / s, ("layernorm",)),
            Kept("router", 4 * FP32 * model.num_experts / s, ("moe",)),
            Kept("expert input", of_input * rows * h, ("moe",)),
            Kept("expert gate, up", size * rows * 2 * f, ("moe",)),
            Kept("expert activation", of_input * rows * f, ("moe", "moe_act")),
        )
    return (
        *attention,
        Kept("normalised MLP input", of_input * h / s, ("mlp",)),
        Kept("gate, up", size * 2 * f / t, ("mlp",)),
        Kept("activation", of_input * f / t, ("mlp",)),
    )


def _cpu_rows(model: ModelSpec, layout: Layout, size: int, fp8: float | None = None) -> tuple[Kept, ...]:
    """The local ones (policy/local_layers.py): norms keep input and normalised values in fp32, and their
    output, which is counted with the next row where that is 16 bits;
    SwiGLU and rotary embedding are made of single operations; sequences are put side by side for attention.
    What the emulation of FP8 keeps is not in it.
    """
    h, q, k, t, s = _sizes(model, layout)
    attention = [
        Kept("layer input", size * h / s),
        Kept("norm of the input, in fp32", FP32 * 2 * h / s, ("layernorm",)),
        Kept("cosines and sines", size * 4 * model.head_dim),
        Kept("padded query, key, value and attention output", size * 2 * (q + k) / t),
        Kept("softmax statistics", FP32 * model.num_heads / t),
        Kept("attention output", size * q / t),
        Kept("MLP input", size * h / s),
        Kept("norm of the MLP input, in fp32", FP32 * 2 * h / s, ("layernorm",)),
    ]
    if model.qk_norm:
        attention.append(Kept("query, key around their norms", (2 * size + FP32) * (q + k) / t))
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


def fp8_bytes(fp8: Fp8Config | None) -> float | None:
    """Of an element that is kept as it was multiplied, its share of the scales included: one in 32 elements,
    or in 128, has one of 1 or 4 bytes.
    """
    if fp8 is None:
        return None
    return 1 + 1 / 32 if fp8.recipe in ("mxfp8", "blockwise") else 1.0


GPU_LAYERS = Layers(rows=_gpu_rows, final_norm=lambda size: size)
CPU_LAYERS = Layers(rows=_cpu_rows, final_norm=lambda size: 2 * FP32)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _PerToken:
    """Bytes for a token that the stage's rank has. chunk: kept by one model chunk. head: kept by the last
    stage behind its last chunk. whole: of the layer that keeps most, without recomputation. recomputed: of
    what is made again for a layer.
    """

    chunk: float
    head: float
    whole: float
    recomputed: float


def _per_token(config: RunConfig, model: ModelSpec, stage: int, layers: Layers) -> _PerToken:
    layout, policy, size = config.layout.to_layout(), config.policy, _item(config)
    per_chunk = model.num_layers // layout.num_stages
    in_fp8 = min(quantized_layers(config, model, stage), per_chunk)
    kinds = []  # how many layers of a chunk, and what each of them keeps
    for number, saved in ((in_fp8, fp8_bytes(policy.fp8)), (per_chunk - in_fp8, None)):
        if number:
            kinds.append((number, layers.rows(model, layout, size, saved)))
    split = layout.tp if layout.sp else 1
    # the final norm's input, and the hidden states that the output layer multiplies
    head = model.hidden_size * (size + layers.final_norm(size) / split)
    return _PerToken(
        chunk=sum(number * kept_per_token(rows, policy) for number, rows in kinds),
        head=head if stage == layout.pp - 1 else 0.0,
        whole=max(sum(row.per_token for row in rows) for _, rows in kinds),
        recomputed=max(recomputed_per_token(rows, policy) for _, rows in kinds),
    )


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
    layout, size = config.layout.to_layout(), _item(config)
    tokens = config.batch.max_tokens / layout.cp
    each, is_last = _per_token(config, model, stage, layers), stage == layout.pp - 1
    held = in_flight(layout, stage, min(micro_batches, 4 * layout.pp))
    widest = max(row.per_token for row in layers.rows(model, layout, size, None))
    # input and its gradient, of all tensor-parallel ranks
    gathered = 2 * size * model.hidden_size if layout.sp else 0
    return Activations(
        kept=tokens * max(chunks * each.chunk + heads * each.head for chunks, heads in held),
        backward=tokens * (each.recomputed + 2 * widest + gathered),
        forward=tokens * each.whole,
        logprobs=_logprobs(tokens, model, layout, size, backward=True) if is_last else 0.0,
        logprobs_forward=_logprobs(tokens, model, layout, size, backward=False) if is_last else 0.0,
        in_flight=model.num_layers // layout.num_stages * max(chunks for chunks, _ in held),
    )


def one_micro_batch(config: RunConfig, model: ModelSpec, stage: int, *, layers: Layers = GPU_LAYERS) -> float:
    """Bytes that a rank of the stage keeps of one micro-batch, in all its model chunks."""
    each, layout = _per_token(config, model, stage, layers), config.layout.to_layout()
    return config.batch.max_tokens / layout.cp * ((layout.vpp or 1) * each.chunk + each.head)


def kept_by_position(
    config: RunConfig, model: ModelSpec, stage: int, *, micro_batches: int, layers: Layers = GPU_LAYERS
) -> Iterator[float]:
    """Bytes on a rank of the stage at each position of its schedule: what it keeps after a forward pass, and
    with what it makes during a backward pass. Of at most four times as many micro-batches as stages.
    """
    layout, micro_batches = config.layout.to_layout(), min(micro_batches, 4 * config.layout.pipeline_parallel)
    whole = rank_activations(config, model, stage, micro_batches=micro_batches, layers=layers)
    each, tokens = _per_token(config, model, stage, layers), config.batch.max_tokens / layout.cp
    kept, last = 0.0, (layout.vpp or 1) - 1
    for forward, chunk in schedule(layout, stage, micro_batches):
        size = tokens * (each.chunk + (each.head if chunk == last else 0.0))
        if forward:
            kept += size
            yield kept
        else:
            yield kept + max(whole.backward, whole.logprobs)
            kept -= size


def _item(config: RunConfig) -> int:
    return 2 if config.model.dtype == "bf16" else 4


def _logprobs(tokens: float, model: ModelSpec, layout: Layout, size: int, *, backward: bool) -> float:
    """Around batching/logprobs.py: forward has the hidden states of all tokens, and those of the trained
    ones. Backward has the scaled hidden states of the trained ones, their gradient in fp32, and the gradient
    of this rank's rows of the output layer.
    """
    hidden = tokens * model.hidden_size
    if not backward:
        return hidden * 2 * size + LOGIT_BLOCKS
    weight = -(-model.vocab_size // layout.tp) * model.hidden_size
    return hidden * (size + FP32) + weight * size + LOGIT_BLOCKS


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
