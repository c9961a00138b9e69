"""How many bytes of parameters, gradients and optimizer state a rank has: pure arithmetic over the table of
parameters (weights/names.py). build.py counts the same in Megatron's own objects.

A value model has the policy's sizes with a scalar head in the place of the output layer (policy/value.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from megatron_dapo.config import RunConfig
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.policy.fp8_rules import is_quantized
from megatron_dapo.weights.names import ROWS, Row
from megatron_dapo.weights.slices import padded_vocab


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of one rank. elements: of its parameters; quantized: those of the matrices that policy.fp8 multiplies
    in FP8. The others are bytes; weights are in model.dtype.
    """

    elements: int
    weights: int
    gradients: int
    optimizer: int
    quantized: int = 0


def rank_sizes(config: RunConfig, model: ModelSpec, stage: int, *, value: bool = False) -> Sizes:
    """Of every rank of a pipeline stage, of the policy or of the value model beside it. Gradients are fp32.
    AdamW keeps two moments in fp32, and for bf16 weights an fp32 copy; the distributed optimizer shards them
    over the ranks that have the same parameters.
    """
    layout = config.layout.to_layout()
    dense, expert = rank_elements(model, layout, stage, value)
    dense_copies = layout.dp * layout.cp
    expert_copies = dense_copies * layout.tp // (layout.ep * layout.etp)
    if not config.optimizer.distributed:
        dense_copies = expert_copies = 1
    bf16 = config.model.dtype == "bf16"
    per_element = 12 if bf16 else 8
    return Sizes(
        elements=dense + expert,
        weights=(dense + expert) * (2 if bf16 else 4),
        gradients=(dense + expert) * 4,
        optimizer=per_element * (math.ceil(dense / dense_copies) + math.ceil(expert / expert_copies)),
        quantized=quantized_layers(config, model, stage) * _matrices_of_a_layer(model, layout),
    )


@functools.lru_cache(maxsize=1024)
def rank_elements(model: ModelSpec, layout: Layout, stage: int, value: bool = False) -> tuple[int, int]:
    """Elements of the parameters outside and inside of experts, padding of the vocabulary included."""
    if value:
        model = dataclasses.replace(model, tied=False)  # as policy/value.py builds it
    counts = {False: 0, True: 0}
    for row in ROWS:
        if row.needs is None or getattr(model, row.needs):
            scalar = value and row.megatron[0] == "output_layer.weight"
            each = model.hidden_size if scalar else _shard(row, model, layout)
            counts[row.expert] += _copies(row, model, layout, stage) * each
    return counts[False], counts[True]


def quantized_layers(config: RunConfig, model: ModelSpec, stage: int) -> int:
    """Layers of a pipeline stage that compute in FP8."""
    layout, layers = config.layout.to_layout(), range(model.num_layers)
    per_chunk = model.num_layers // layout.num_stages
    own = (i for i in layers if i // per_chunk % layout.pp == stage)  # chunks are dealt out in turn
    return sum(is_quantized(config.policy.fp8, i, model.num_layers) for i in own)


def is_matrix(row: Row) -> bool:
    """Whether FP8 concerns it: the linear layers of a transformer layer, not the router."""
    name = row.megatron[0]
    return name.startswith("decoder.layers.") and "linear_" in name and ".weight" in name


def _matrices_of_a_layer(model: ModelSpec, layout: Layout) -> int:
    rows = [row for row in ROWS if is_matrix(row) and (row.needs is None or getattr(model, row.needs))]
    experts = model.num_experts // layout.ep
    return sum((experts if row.expert else 1) * _shard(row, model, layout) for row in rows)


def _copies(row: Row, model: ModelSpec, layout: Layout, stage: int) -> int:
    """Parameters of this kind on a rank of the stage."""
    name, last = row.megatron[0], layout.pp - 1
    if name.startswith("decoder.layers."):
        return model.num_layers // layout.pp * (model.num_experts // layout.ep if row.expert else 1)
    if name.startswith("embedding."):
        return int(stage == 0 or (stage == last and model.tied))
    return int(stage == last)


def _shard(row: Row, model: ModelSpec, layout: Layout) -> int:
    shapes = [model.shape(sizes) for sizes in row.hf.values()]
    elements, parts = sum(map(math.prod, shapes)), layout.etp if row.expert else layout.tp
    if row.split == "replicated":
        return elements
    if row.split == "vocab":
        [(rows, width)] = shapes
        return padded_vocab(rows, parts) // parts * width
    return elements // parts
