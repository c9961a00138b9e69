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

import numpy as np
import zstandard

from megatron_dapo.errors import UserError
from megatron_dapo.types import Completion, Group, Prompt

FORMAT = 2  # 2: completions name the weight version of every token, their number, and masked tokens

ARRAYS = {"tokens": np.int32, "logprobs": np.float32, "trained": np.bool_}


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
    """The groups and the header of a file of `save_groups`. UserError names a file that is missing, cut
    short or corrupt.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no rollout file at {path}; report.rollouts=true writes one for each step")
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
        raise UserError(
            f"rollout file {path} is cut short, corrupt or of another version ({error}); delete it or sample "
            f"again"
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
        "completions": [_encode_completion(completion) for completion in group.completions],
    }


def _encode_completion(completion: Completion) -> dict[str, Any]:
    """Arrays as lists (a float32 is written as the double that equals it); `trained` null: every token is."""
    arrays = {name: getattr(completion, name).tolist() for name in ARRAYS}
    return _fields(completion) | arrays | {"trained": None if all(arrays["trained"]) else arrays["trained"]}


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _decode(value: dict[str, Any]) -> Group:
    prompt = Prompt(**_tuples(value["prompt"]))
    completions = tuple(_decode_completion(completion) for completion in value["completions"])
    return Group(**{**_tuples(value), "prompt": prompt, "completions": completions})


def _decode_completion(value: dict[str, Any]) -> Completion:
    trained = [True] * len(value["tokens"]) if value["trained"] is None else value["trained"]
    arrays = {
        name: np.asarray((value | {"trained": trained})[name], dtype=dtype) for name, dtype in ARRAYS.items()
    }
    versions = tuple((int(version), int(length)) for version, length in value["versions"])
    return Completion(**{**value, **arrays, "versions": versions})


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
