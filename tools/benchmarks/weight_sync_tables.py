"""Of the sink tables of workers: what they must receive at least, and tables by which they receive all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch

from megatron_dapo.sync.sinks import SinkTable


def shard_bytes(table: SinkTable) -> int:
    """Bytes of the worker's parameters without padding, whatever the table sends to them."""
    sizes = {name: getattr(torch, dtype).itemsize for name, dtype in table.dtypes.items()}
    padding = sum(math.prod(row.size) * sizes[row.parameter] for row in table.padding)
    return sum(math.prod(shape) * sizes[name] for name, shape in table.shapes.items()) - padding


def whole_table(table: SinkTable, names: Iterable[str]) -> SinkTable:
    """For the same worker, which is sent all tensors whole and loads them with vLLM's own loaders."""
    computed = dict.fromkeys(table.shapes, "benchmark")
    return dataclasses.replace(table, sinks=(), padding=(), whole=tuple(names), computed=computed)
