"""The keys of Megatron's distributed checkpoints and the parameters behind them.

A key stands for one tensor of the whole model, of no layout. Layers that are alike share a key, stacked along
a first axis, and so do experts along a second: `decoder.layers.mlp.linear_fc2.weight` is [layers, hidden,
ffn]. Models whose layers differ have a key for each layer, and "singleton local shards" also one for each
expert and for each half of a gated linear layer. Both of Megatron's layer specs write TransformerEngine's
names of norms, but for the norm before experts: there the local one writes `mlp.linear_fc1.layer_norm_weight`
and TransformerEngine's `pre_mlp_layernorm.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.weights.names import ROWS, Row

# What a training checkpoint holds beside the model. The parts of an optimizer may be numbered.
_OTHERS = re.compile(
    r"(chained_\d+\.)?optimizer\.|value_model\.|rng_state|rerun_state_machine|opt_param_scheduler|"
    r".*\._extra_state"
)
_WRAPPERS = re.compile(r"^(?:module\.|model\.)+")
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_EXPERT = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?linear_fc([12])\.weight(_[wv])?")
_HALF = re.compile(r"(mlp\.linear_fc1\.weight)(_[wv])")


@dataclass(frozen=True, slots=True)
class DiskKey:
    """What a key stands for.

    name: of the parameter, `{i}` and `{e}` for the numbers of layer and expert that the tensor's first axes
    count. half: 0 or 1 for the gate's or the other half of a gated linear layer, None for the whole.
    """

    name: str
    axes: int
    half: int | None = None

    def parameter(self, index: tuple[int, ...]) -> str:
        """The name at an index of the first axes."""
        numbers = iter(index)
        i = next(numbers) if "{i}" in self.name else None
        e = next(numbers) if "{e}" in self.name else None
        return self.name.format(i=i, e=e)


def parse(key: str) -> DiskKey | None:
    """None for what is no parameter of the model."""
    key = _WRAPPERS.sub("", key)
    if _OTHERS.match(key):
        return None
    if not (layer := _LAYER.fullmatch(key)):
        return DiskKey(key, 0)
    number, rest = layer.groups()
    prefix, axes = f"decoder.layers.{number or '{i}'}.", 0 if number else 1
    if expert := _EXPERT.fullmatch(rest):
        e, k, half = expert.groups()
        name = f"{prefix}mlp.experts.linear_fc{k}.weight{e or '{e}'}"
        return DiskKey(name, axes + (0 if e else 1), _half(half))
    if gated := _HALF.fullmatch(rest):
        return DiskKey(prefix + gated[1], axes, _half(gated[2]))
    return DiskKey(prefix + rest, axes)


def _half(ending: str | None) -> int | None:
    return None if ending is None else "_w_v".index(ending) // 2


@dataclass(frozen=True, slots=True)
class Target:
    """Where a parameter goes in a distributed checkpoint: into the tensors `keys` (all names of the same
    one), at `index` of their first axes, which have the sizes `stack`.
    """

    name: str
    keys: tuple[str, ...]
    index: tuple[int, ...]
    stack: tuple[int, ...]


def targets(model: ModelSpec) -> Iterator[Target]:
    """Every parameter of the model once, under TransformerEngine's name."""
    for row in ROWS:
        if row.needs is not None and not getattr(model, row.needs):
            continue
        name, keys = row.megatron[-1], _keys(row, model)
        layers = range(model.num_layers) if "{i}" in name else [None]
        for i in layers:
            for e in range(model.num_experts) if row.expert else [None]:
                yield Target(name.format(i=i, e=e), keys, _index(i, e), _stack(model, i, e))


def _index(i: int | None, e: int | None) -> tuple[int, ...]:
    return tuple(number for number in (i, e) if number is not None)


def _stack(model: ModelSpec, i: int | None, e: int | None) -> tuple[int, ...]:
    sizes = (model.num_layers, i), (model.num_experts, e)
    return tuple(size for size, number in sizes if number is not None)


def _keys(row: Row, model: ModelSpec) -> tuple[str, ...]:
    """Both names of the norm before experts: the layer specs do not agree on it."""
    before_experts = model.num_experts and row.megatron[0].endswith("pre_mlp_layernorm.weight")
    names = row.megatron if before_experts else row.megatron[-1:]
    if row.expert:
        names = (re.sub(r"experts\.(linear_fc[12]\.weight)\{e\}", r"experts.experts.\1", names[-1]),)
    return tuple(name.replace("layers.{i}.", "layers.") for name in names)


def extra_states(model: ModelSpec) -> Iterator[str]:
    """Keys of the objects without content that both layer specs ask for beside the parameters:
    TransformerEngine's modules have an extra state each, and a key that is missing is an error in Megatron.
    """
    attention = ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm")
    modules = [f"self_attention.{name}" for name in attention]
    modules += ["input_layernorm", "pre_mlp_layernorm"]
    modules += ["mlp.router"] if model.num_experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    layers = model.num_layers
    for name in modules:
        yield from (f"decoder.layers.{name}._extra_state/shard_{i}_{layers}" for i in range(layers))
    for name in ("linear_fc1", "linear_fc2"):
        for i in range(layers):
            for e in range(model.num_experts):
                at = f"{i}.{e}_{layers}.{model.num_experts}"
                yield f"decoder.layers.mlp.experts.experts.{name}._extra_state/shard_{at}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"
