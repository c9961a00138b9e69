"""What a checkpoint holds, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from megatron_dapo.convert.checkpoint import FORMATS, open_checkpoint
from megatron_dapo.convert.mapping import read_architecture


def describe(path: Path) -> dict[str, Any]:
    """Format, architecture, layout and step as far as they are known, parameters and bytes by type, sizes of
    the files. A Megatron vocabulary counts with its padding.
    """
    checkpoint = open_checkpoint(path)
    elements: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        elements[str(tensor.dtype).removeprefix("torch.")] += tensor.shape[0] * tensor.columns
    largest = max(checkpoint.tensors.items(), key=lambda item: item[1].num_bytes)
    files = {block.file for tensor in checkpoint.tensors.values() for block in tensor.blocks}
    return {
        "path": str(checkpoint.folder),
        "format": FORMATS[checkpoint.format],
        "architecture": read_architecture(checkpoint.hf_folder) if checkpoint.hf_folder else None,
        "step": checkpoint.step,
        "layout": dict(checkpoint.layout),
        "tensors": len(checkpoint.tensors),
        "parameters": sum(elements.values()),
        "dtypes": dict(elements),
        "weight_bytes": sum(tensor.num_bytes for tensor in checkpoint.tensors.values()),
        "largest_tensor": {"name": largest[0], "bytes": largest[1].num_bytes},
        "files": len(files),
        "file_bytes": sum(file.stat().st_size for file in files),
    }


def as_text(facts: dict[str, Any]) -> str:
    layout = " ".join(f"{name}{size}" for name, size in facts["layout"].items()) or "unknown"
    dtypes = ", ".join(f"{count:,} {name}" for name, count in facts["dtypes"].items())
    largest = facts["largest_tensor"]
    return "\n".join(
        (
            f"{facts['path']}",
            f"format        {facts['format']}",
            f"architecture  {facts['architecture'] or 'unknown (no config.json)'}",
            f"step          {'unknown' if facts['step'] is None else facts['step']}",
            f"saved by      {layout}",
            f"tensors       {facts['tensors']:,}",
            f"parameters    {facts['parameters']:,} ({dtypes})",
            f"weights       {facts['weight_bytes'] / 1e9:.3f} GB in {facts['files']} files of "
            f"{facts['file_bytes'] / 1e9:.3f} GB",
            f"largest       {largest['name']}, {largest['bytes'] / 1e9:.3f} GB",
        )
    )
