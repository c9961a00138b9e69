"""Is an engine's set of sink tables right? Pure checks; each returns a sentence for every problem it finds.

1. `coverage_problems`: every element of every parameter is written exactly once.
2. `source_problems`: every element of every Hugging Face tensor is taken by some rank, and tensor-parallel
   ranks take their parts (or their experts) in order.
3. `naming_problems`: each part of each parameter comes from the tensor of its own name: layer, leaf, expert,
   and the order of q/k/v and of gate/up.
4. `scale_problems`: no loader computes with tensors in block FP8 or with their scales.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from megatron_dapo.sync.regions import MappedBox, boxes_of, without
from megatron_dapo.sync.sinks import Sink, SinkTable
from megatron_dapo.weights.block_fp8 import SCALES

# Modules that vLLM makes of several Hugging Face modules, whose parts lie in this order.
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# The same for the experts of a layer, which lie one behind the other in one parameter.
EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
# Scales of an FP8 cache, which vLLM gives every attention layer of an FP8 model, whatever its cache is. It
# builds them as -1, takes that for "not in the checkpoint", and uses 1 (layers/quantization/kv_cache.py).
CACHE_SCALE = re.compile(r".*\.attn\.(q|k|v|prob)_scale")


def problems(tables: Sequence[SinkTable], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """All that is wrong with the tables of one engine's workers. shapes: of the checkpoint's tensors."""
    found, block_fp8 = [], any(name.endswith(SCALES) for name in shapes)
    for table in tables:
        where = f"tp rank {table.tp_rank}, pp rank {table.pp_rank}: "
        unset = CACHE_SCALE if block_fp8 else None
        of_table = (*coverage_problems(table, unset), *naming_problems(table), *scale_problems(table, shapes))
        found += [where + problem for problem in of_table]
    return found + source_problems(tables, shapes)


def coverage_problems(table: SinkTable, unset: re.Pattern[str] | None = None) -> list[str]:
    """Elements of parameters that are written never or twice. What a loader computes is not looked into.
    unset: names of scalars that may also keep the value that the engine was built with.
    """
    rows = defaultdict(list)
    for row in (*table.padding, *table.sinks):
        rows[row.parameter].append(row)
    found = []
    for name, shape in table.shapes.items():
        if name in table.computed:
            if rows[name]:
                found.append(f"{name} is computed by its loader and written by a sink as well")
            continue
        if unset and unset.fullmatch(name) and not shape and not rows[name]:
            continue
        left = [MappedBox((0,) * len(shape), shape)] if math.prod(shape) else []
        for row in rows[name]:
            by = row.source if isinstance(row, Sink) else "padding"
            before = _count(left)
            try:
                for box in boxes_of(row.region, shape, row.region):
                    left = without(left, box)
            except ValueError as error:
                found.append(f"{name}: written by {by} outside of its storage: {error}")
                continue
            if again := math.prod(row.size) - (before - _count(left)):
                found.append(f"{name}: {again} elements are written again by {by}")
        if left:
            found.append(f"{name}: {_count(left)} of {math.prod(shape)} elements are never written")
    return found


def source_problems(tables: Sequence[SinkTable], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Elements of Hugging Face tensors that no worker of the engine takes, and workers out of order."""
    found = _rank_problems(tables)
    taken = defaultdict(set)  # equal boxes of several ranks once
    firsts = defaultdict(dict)  # by parameter and part: the first expert and element that each rank takes
    for table in tables:
        for sink in table.sinks:
            taken[sink.source].add((sink.start, sink.size))
            if place := place_of(sink.parameter, sink.source):
                of_rank = firsts[sink.parameter, place[1]]
                first = (place[0], sink.start)
                of_rank[table.tp_rank] = min(first, of_rank.get(table.tp_rank, first))
    whole = {name for table in tables for name in table.whole}
    for name, shape in shapes.items():
        if name in whole:
            continue
        left = [MappedBox((0,) * len(shape), shape)]
        for start, size in sorted(taken[name]):
            left = without(left, MappedBox(start, size))
        if left:
            found.append(f"{name}: {_count(left)} of {math.prod(shape)} elements are taken by no rank")
    for (parameter, _), of_rank in firsts.items():
        in_order = [of_rank[rank] for rank in sorted(of_rank)]
        if in_order != sorted(in_order):
            found.append(f"{parameter}: the tp ranks take their parts out of order, from {in_order}")
    return found


def naming_problems(table: SinkTable) -> list[str]:
    """Sinks from a tensor of another name, and parts or experts out of order."""
    found, places = [], defaultdict(list)
    for sink in table.sinks:
        place = place_of(sink.parameter, sink.source)
        if place is None:
            found.append(
                f"{sink.parameter} takes elements of {sink.source}, which is another parameter; if the model "
                f"names it so, add it to PACKED or EXPERTS in megatron_dapo/sync/sink_checks.py"
            )
        else:
            places[sink.parameter].append((sink.offset, place, sink.source))
    for parameter, parts in places.items():
        in_order = [place for _, place, _ in sorted(parts)]
        if in_order != sorted(in_order):
            names = [source for _, _, source in sorted(parts)]
            found.append(f"{parameter}: its parts lie out of order: {', '.join(dict.fromkeys(names))}")
    return found


def scale_problems(table: SinkTable, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Tensors of a checkpoint in block FP8 that the engine's loaders compute with: these would be sent whole,
    in the type of the others.
    """
    return [
        f"{name} is in block FP8, and the engine computes with it as it loads it; choose a "
        f"rollout.tensor_parallel that cuts it at multiples of 128"
        for name in table.whole
        if name.endswith(SCALES) or name + SCALES in shapes
    ]


def place_of(parameter: str, source: str) -> tuple[int, int] | None:
    """(expert, part) where elements of a Hugging Face tensor belong in an engine's parameter, if they do."""
    module, _, leaf = parameter.rpartition(".")
    outer, _, name = module.rpartition(".")
    if packed := re.fullmatch(r"(w13|w2)_(\w+)", leaf):
        experts, parts = module.removesuffix(".routed_experts") + ".", EXPERTS[packed[1]]
        found = re.fullmatch(r"(\d+)\.(\w+)\.(\w+)", source.removeprefix(experts))
        fits = source.startswith(experts) and found and found[2] in parts and found[3] == packed[2]
        return (int(found[1]), parts.index(found[2])) if found and fits else None
    names = [f"{outer}.{part}.{leaf}" for part in PACKED[name]] if name in PACKED else [parameter]
    return (0, names.index(source)) if source in names else None


def _rank_problems(tables: Sequence[SinkTable]) -> list[str]:
    """There must be one table of every rank of one engine."""
    expected = [(pp, tp) for pp in range(tables[0].pp) for tp in range(tables[0].tp)] if tables else []
    ranks = sorted((table.pp_rank, table.tp_rank) for table in tables)
    return (
        [] if ranks == expected else [f"the tables are of the (pp, tp) ranks {ranks} instead of {expected}"]
    )


def _count(boxes: Sequence[MappedBox]) -> int:
    return sum(box.num_elements for box in boxes)
