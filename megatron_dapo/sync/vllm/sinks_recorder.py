"""A worker's sink table, recorded while vLLM's own loaders run on meta tensors.

A dispatch mode watches every operation. Where a copy comes from and where it goes to is known by the storages
of its two tensors, so any view (narrow, chunk, t, unbind) is understood and no loader is wrapped. Temporaries
made by copying (clone, to, contiguous, cat) are seen through; a value that a loader computes makes its
parameter `computed` and the tensors that it computes with `whole`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dapo.sync.regions import MappedBox, Region, boxes_of, row_major, without
from megatron_dapo.sync.sinks import Padding, Sink, SinkTable

MAX_BOXES = 4096  # of one copy; one that falls into more counts as computed

TensorFacts = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # Hugging Face name -> shape, dtype


def record_sinks(model: torch.nn.Module, tensors: TensorFacts, ranks: Mapping[str, int]) -> SinkTable:
    """The table of a model whose parameters are on the meta device, for a checkpoint of these tensors.

    ranks: the fields of SinkTable about the worker's place (tp, tp_rank, ...). Raises what vLLM's loaders
    raise for this checkpoint, and ValueError for a parameter whose elements do not fill its storage.
    """
    recorder = Recorder(model)
    sources = [(name, recorder.source(name, shape, dtype)) for name, (shape, dtype) in tensors.items()]
    loading: Any = model
    with torch.no_grad(), recorder:
        loading.load_weights(iter(sources))
    return recorder.table(ranks)


@dataclass
class Contents:
    """What the storage of a temporary holds, or that of a tensor given to the loaders.

    parts: boxes of it that are copies, each with its region in the Hugging Face tensor of that name.
    computed: if set, the operation that no copy can replay and that made it from the tensors `names`.
    """

    shape: tuple[int, ...]  # outermost dimension of the storage first
    dtype: torch.dtype
    parts: list[tuple[str, MappedBox]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    computed: str = ""


@dataclass
class Target:
    """A parameter or buffer of the model, and what was written into it, in order. `computed`, `names`: as in
    Contents.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    writes: list[Sink | Padding] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    computed: str = ""


class Recorder(TorchDispatchMode):
    """Watches the loaders of `model`; `source` makes the tensors that they are given."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._kept: list[torch.Tensor] = []  # the storage of a freed tensor could lend its address to another
        self._targets: dict[int, Target] = {}
        self._contents: dict[int, Contents] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            if _storage_shape(tensor) is None:
                raise ValueError(f"the elements of parameter {name} do not fill its storage")
            self._watch(name, tensor, is_parameter=True)
        for name, tensor in model.named_buffers(remove_duplicate=False):
            self._watch(name, tensor, is_parameter=False)

    def _watch(self, name: str, tensor: torch.Tensor, *, is_parameter: bool) -> None:
        shape = _storage_shape(tensor)
        if shape is not None and _key(tensor) not in self._targets:
            self._targets[_key(tensor)] = Target(name, shape, tensor.dtype, is_parameter)
            self._kept.append(tensor)

    def source(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A meta tensor that stands for the Hugging Face tensor `name`."""
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        whole = MappedBox((0,) * len(shape), tuple(shape), 0, row_major(tuple(shape)))
        self._shapes[name] = tuple(shape)
        contents = self._hold(tensor)
        contents.parts, contents.names = [(name, whole)], {name}
        return tensor

    def table(self, ranks: Mapping[str, int]) -> SinkTable:
        """What was recorded so far."""
        targets = [t for t in self._targets.values() if t.is_parameter or t.names]
        whole = _mark_computed(targets)
        copied = [t for t in targets if not t.computed]
        return SinkTable(
            sinks=tuple(sorted(row for t in copied for row in t.writes if isinstance(row, Sink))),
            dtypes={t.name: str(t.dtype).removeprefix("torch.") for t in targets},
            shapes={t.name: t.shape for t in targets},
            whole=tuple(sorted(whole)),
            padding=tuple(sorted(row for t in copied for row in _padding(t))),
            computed={t.name: t.computed for t in targets if t.computed},
            **ranks,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name == "copy_" and args[0].is_meta != args[1].is_meta:
            out = args[0]  # torch cannot copy out of meta; that it is copied is all that counts
        elif name == "_to_copy" and args[0].is_meta:
            out = func(*args, **{**kwargs, "device": "meta"})
        else:
            out = func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        if name == "copy_":
            self._copy(args[0], args[1])
        elif name in ("fill_", "zero_") and not any(map(self._names, inputs[1:])):
            self._fill(args[0], float(args[1]) if name == "fill_" else 0.0)
        elif func._schema.is_mutable:
            for written in _written(func, args, kwargs):
                self._compute(written, name, inputs)
        else:
            for made in _tensors(out):
                if _key(made) not in self._targets and _key(made) not in self._contents:  # not a view
                    self._make(made, name, args, inputs)
        return out

    def _make(self, made: torch.Tensor, name: str, args: Any, inputs: list[torch.Tensor]) -> None:
        """`made` is a new tensor, the result of an operation."""
        depends = any(self._names(tensor) for tensor in inputs)
        if not (depends or made.is_meta):
            return
        self._hold(made)
        if name in ("clone", "_to_copy"):
            self._copy(made, inputs[0])
        elif name == "cat":
            dim, at = args[1] if len(args) > 1 else 0, 0
            for piece in inputs:
                self._copy(made.narrow(dim, at, piece.shape[dim]), piece)
                at += piece.shape[dim]
        elif depends and not name.endswith("_like") and not name.startswith("new_"):  # of the shape alone
            self._compute(made, name, inputs)

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Note where each element of `to` comes from."""
        into = self._held(to)
        if into is None:
            if not self._names(source):
                return
            into = self._hold(to)
        contents = self._contents.get(_key(source))
        if contents is None or contents.computed or not contents.parts or into.computed:
            reason = contents.computed if contents else ""
            self._compute(to, reason or "values that are not in the checkpoint", [source])
            return
        if source.dtype != contents.dtype or to.dtype != into.dtype:
            self._compute(to, "bits read as another dtype", [source])
            return
        if isinstance(into, Contents) and not _holds(into.dtype, contents.dtype):
            self._compute(to, f"rounding to {into.dtype}", [source])
            return
        rows = list(itertools.islice(self._cut(into, contents, to, source), MAX_BOXES + 1))
        if len(rows) > MAX_BOXES:
            self._compute(to, "a copy in too many pieces", [source])
        elif sum(box.num_elements for _, box in rows) != to.numel():
            self._compute(to, "values that are not in the checkpoint", [source])
        elif isinstance(into, Target):
            into.writes += [Sink(into.name, name, b.start, b.size, b.offset, b.stride) for name, b in rows]
            into.names |= contents.names
        elif any(old.common(new) for _, new in rows for _, old in into.parts):
            self._compute(to, "a temporary that is written twice", [source])
        else:
            into.parts += rows
            into.names |= contents.names

    def _cut(
        self, into: Target | Contents, contents: Contents, to: torch.Tensor, source: torch.Tensor
    ) -> Iterator[tuple[str, MappedBox]]:
        """The elements of `to`: for a target boxes of Hugging Face tensors, for a temporary boxes of it."""
        for here in boxes_of(_region(source.expand(to.shape)), contents.shape, _region(to)):
            for name, part in contents.parts:
                ours, theirs = here.common(part), part.common(here)
                if ours is None or theirs is None:
                    continue
                if isinstance(into, Target):
                    cut = boxes_of(theirs.region, self._shapes[name], ours.region)
                else:
                    cut = boxes_of(ours.region, into.shape, theirs.region)
                for box in cut:
                    yield name, box

    def _fill(self, to: torch.Tensor, value: float) -> None:
        target = self._targets.get(_key(to))
        if target is not None:
            region = _region(to)
            target.writes.append(Padding(target.name, region.offset, region.size, region.stride, value))
        else:
            self._compute(to, "fill_", [])

    def _compute(self, to: torch.Tensor, reason: str, inputs: list[torch.Tensor]) -> None:
        """No copy can replay what `to` holds now, unless no tensor of the checkpoint has a part in it."""
        into = self._held(to) or self._hold(to)
        into.names = into.names.union(*map(self._names, inputs))
        if into.names:
            into.computed = into.computed or reason

    def _names(self, tensor: torch.Tensor) -> set[str]:
        """The Hugging Face tensors that the values of `tensor` depend on."""
        held = self._held(tensor)
        return held.names if held else set()

    def _held(self, tensor: torch.Tensor) -> Target | Contents | None:
        return self._targets.get(_key(tensor)) or self._contents.get(_key(tensor))

    def _hold(self, tensor: torch.Tensor) -> Contents:
        shape = _storage_shape(tensor)
        contents = Contents(shape or (), tensor.dtype)
        if shape is None:
            contents.computed = "a temporary that does not fill its storage"
        self._contents[_key(tensor)] = contents
        self._kept.append(tensor)
        return contents


def _mark_computed(targets: list[Target]) -> set[str]:
    """The tensors to be sent whole. The real loader puts them into all parameters that they are a part of, so
    these become computed too, with all their tensors.
    """
    whole: set[str] = set()
    while found := [t for t in targets if not t.names <= whole and (t.computed or t.names & whole)]:
        for target in found:
            target.computed = target.computed or "shares a tensor with a computed parameter"
            whole |= target.names
    return whole


def _padding(target: Target) -> Iterator[Padding]:
    """The constants of a parameter that nothing overwrote."""
    steps = row_major(target.shape)
    for number, row in enumerate(target.writes):
        if not isinstance(row, Padding):
            continue
        left = list(boxes_of(row.region, target.shape, row.region))
        for later in target.writes[number + 1 :]:
            for box in boxes_of(later.region, target.shape, later.region):
                left = without(left, box)
        for box in left:
            offset = sum(low * step for low, step in zip(box.start, steps, strict=True))
            yield Padding(target.name, offset, box.size, steps, row.value)


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an operation changes."""
    written = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += _tensors(args[number] if number < len(args) else kwargs.get(argument.name))
    return written


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _region(tensor: torch.Tensor) -> Region:
    return Region(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def _storage_shape(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The sizes of `tensor` in the order in which its storage is row-major; None if it does not fill it."""
    dims = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    shape = tuple(tensor.shape[dim] for dim in dims)
    strides = tuple(tensor.stride(dim) for dim in dims)
    fills = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    in_order = all(n == 1 or a == b for n, a, b in zip(shape, strides, row_major(shape), strict=True))
    return shape if fills and in_order else None


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Every value of `narrow` is one of `wide`."""
    is_float = (wide.is_floating_point, narrow.is_floating_point)
    return wide == narrow or (wide.itemsize > narrow.itemsize and is_float != (False, True))
