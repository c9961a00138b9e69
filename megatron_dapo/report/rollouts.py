"""Every step's groups on disk, exactly, so that a training step replays without an engine (tools/replay.py).

`rollouts/step_000003.jsonl.zst`: zstandard-compressed JSON lines. The first line is the header
{format, step, weight_version, num_groups, samples_per_prompt, meta}; each other line is one Group.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import zstandard

from megatron_dapo.types import Completion, Group, Prompt

FORMAT = 1


def rollout_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "rollouts" / f"step_{step:06d}.jsonl.zst"


def save_groups(path: str | Path, groups: Sequence[Group], step: int, meta: dict[str, Any]) -> None:
    """Write the groups of a step atomically; `meta` is any JSON values. Floats come back bit-equal."""
    path = Path(path)
    sizes = {len(group.completions) for group in groups}
    header = {
        "format": FORMAT,
        "step": step,
        "weight_version": min((group.weight_version for group in groups), default=None),
        "num_groups": len(groups),
        "samples_per_prompt": sizes.pop() if len(sizes) == 1 else None,
        "meta": meta,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            with zstandard.ZstdCompressor(write_checksum=True).stream_writer(file, closefd=False) as stream:
                stream.write(_line(header))
                for group in groups:
                    stream.write(_line(_encode(group)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_groups(path: str | Path) -> tuple[list[Group], dict[str, Any]]:
    """The groups and the header of a file of `save_groups`. ValueError names a file that is missing, cut short or corrupt."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no rollout file at {path}; report.rollouts=true writes one for each step")
    groups: list[Group] = []
    try:
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            lines = _lines(stream)
            header = json.loads(next(lines, b""))
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
            groups = [_decode(json.loads(line)) for line in lines]
        # zstandard reads a file that was cut at a block without complaint, so the count decides.
        if len(groups) != header["num_groups"]:
            raise ValueError(f"{len(groups)} of {header['num_groups']} groups")
    except (zstandard.ZstdError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"rollout file {path} is cut short, corrupt or of another version ({error}); delete it or sample again"
        ) from error
    return groups, header


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _lines(stream: Any) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 20):
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    if rest:
        raise ValueError("the last line has no end")


def _encode(group: Group) -> dict[str, Any]:
    return {
        **_fields(group),
        "prompt": _fields(group.prompt),
        "completions": [_fields(completion) for completion in group.completions],
    }


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _decode(value: dict[str, Any]) -> Group:
    prompt = Prompt(**_tuples(value["prompt"]))
    completions = tuple(Completion(**_tuples(completion)) for completion in value["completions"])
    return Group(**{**_tuples(value), "prompt": prompt, "completions": completions})


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
