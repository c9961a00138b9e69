"""Every step's groups on disk, exactly, so that a training step replays without an engine (tools/replay.py)
and a reader sees what the model wrote (tools/show_rollouts.py).

`rollouts/step_000003.parquet`: one row a completion, those of a group one after another, compressed with
zstd. The file's metadata has the header {format, step, weight_version, num_groups, group_sizes, meta} as JSON
under `megatron_dapo`. When and where a group was made (Group.timing) is in facts.jsonl instead.

Columns: position, row, prompt, answer, prompt_tokens, rule, source (of the prompt); number, seed,
finish_reason, tokens, logprobs, trained (null: every token is), versions and version_tokens (runs of weight
versions), reward_parts (by name) of the completion; correct, reward.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dapo.errors import UserError
from megatron_dapo.types import Completion, Group, Prompt

FORMAT = 4  # 4: with rule, source and reward_parts, which files of 3 lack; 1 and 2 were JSON lines
METADATA_KEY = b"megatron_dapo"
# Completions that are converted and compressed at once: bounds what a writer needs beside the groups.
ROWS = 512
# Level 3 makes files 11 % smaller than 1 at the same speed. Plain pages beat BYTE_STREAM_SPLIT by 0.4 bytes a
# token: many log-probabilities are 0 or one of a few values next to it, equal in all four bytes. Large pages
# let zstd see other responses to the same prompt.
LEVEL, PAGE_BYTES = 3, 8 << 20

TEXTS = ("prompt", "answer", "finish_reason", "rule", "source")
NAMES_OF_PARTS = "reward_parts.key_value.key"
OF_FORMAT_3 = pa.schema(
    [
        ("position", pa.int64()),
        ("row", pa.int64()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("number", pa.int32()),
        ("seed", pa.int64()),
        ("finish_reason", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("trained", pa.list_(pa.bool_())),
        ("versions", pa.list_(pa.int32())),
        ("version_tokens", pa.list_(pa.int32())),
        ("correct", pa.bool_()),
        ("reward", pa.float64()),
    ]
)
ADDED = pa.schema(
    [
        ("rule", pa.string()),
        ("source", pa.string()),
        ("reward_parts", pa.map_(pa.string(), pa.float64())),
    ]
)
SCHEMAS = {3: OF_FORMAT_3, FORMAT: pa.unify_schemas([OF_FORMAT_3, ADDED])}


def rollout_path(run_dir: str | Path, step: int) -> Path:
    """Where a step's groups are."""
    return Path(run_dir) / "rollouts" / f"step_{step:06d}.parquet"


def save_groups(path: str | Path, groups: Sequence[Group], step: int, meta: dict[str, Any]) -> None:
    """Write the groups of a step atomically; `meta` is any JSON values. Floats come back bit-equal."""
    path = Path(path)
    header = json.dumps(
        {
            "format": FORMAT,
            "step": step,
            "weight_version": min((group.weight_version for group in groups), default=None),
            "num_groups": len(groups),
            "group_sizes": [len(group.completions) for group in groups],
            "meta": meta,
        }
    ).encode()
    # Pages carry checksums of their own, metadata does not.
    schema = SCHEMAS[FORMAT].with_metadata({METADATA_KEY: b"%08x%s" % (zlib.crc32(header), header)})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            with pq.ParquetWriter(
                file,
                schema,
                compression="zstd",
                compression_level=LEVEL,
                data_page_size=PAGE_BYTES,
                use_dictionary=[*TEXTS, NAMES_OF_PARTS],  # type: ignore[arg-type]  # or names of columns
                write_statistics=False,
                write_page_checksum=True,
            ) as writer:
                for rows in _chunks(groups):
                    writer.write_batch(_encode(rows, schema), row_group_size=len(rows))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_groups(path: str | Path) -> tuple[list[Group], dict[str, Any]]:
    """The groups and the header of a file of `save_groups`. UserError names a file that is missing, cut
    short, corrupt or of another version.
    """
    path = Path(path)
    if not path.is_file():
        older = path.with_suffix(".jsonl.zst")
        if older.is_file():
            raise UserError(
                f"{older} was written by an earlier version; sample again, or read it with that one"
            )
        raise UserError(
            f"no rollout file at {path}; report.rollouts=true writes one for each step, and "
            f"report.keep_rollouts says how many stay"
        )
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            header = _read_header(file.schema_arrow.metadata or {})
            if not file.schema.equals(_written_schema(header["format"])):
                raise ValueError("it has other columns")
            rows = list(chain.from_iterable(map(_decode, _row_groups(file, header["format"]))))
        return _groups(rows, header["group_sizes"]), header
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"rollout file {path} is cut short, corrupt or of another version ({error}); delete it or sample "
            f"again"
        ) from error


# One row: the prompt, one of its completions, its correctness and its reward.
Row = tuple[Prompt, Completion, bool | None, float]


def _chunks(groups: Sequence[Group]) -> Iterator[list[Row]]:
    rows: list[Row] = []
    for group in groups:
        for completion, correct, reward in zip(group.completions, group.correct, group.rewards, strict=True):
            rows.append((group.prompt, completion, correct, reward))
            if len(rows) == ROWS:
                yield rows
                rows = []
    if rows:
        yield rows


def _encode(rows: Sequence[Row], schema: pa.Schema) -> pa.RecordBatch:
    prompts, completions, correct, rewards = zip(*rows, strict=True)
    all_trained = [bool(c.trained.all()) for c in completions]
    versions = [np.array(c.versions, dtype=np.int32).reshape(-1, 2) for c in completions]
    columns = {
        "position": pa.array([p.position for p in prompts], pa.int64()),
        "row": pa.array([p.row for p in prompts], pa.int64()),
        "prompt": _texts([p.text for p in prompts]),
        "answer": _texts([p.answer for p in prompts]),
        "prompt_tokens": _lists([np.array(p.tokens, dtype=np.int32) for p in prompts]),
        "number": pa.array([c.number for c in completions], pa.int32()),
        "seed": pa.array([c.seed for c in completions], pa.int64()),
        "finish_reason": _texts([c.finish_reason for c in completions]),
        "tokens": _lists([c.tokens for c in completions]),
        "logprobs": _lists([c.logprobs for c in completions]),
        "trained": _lists(
            [
                c.trained[:0] if every else c.trained
                for c, every in zip(completions, all_trained, strict=True)
            ],
            null=all_trained,
        ),
        "versions": _lists([runs[:, 0] for runs in versions]),
        "version_tokens": _lists([runs[:, 1] for runs in versions]),
        "correct": pa.array(correct, pa.bool_()),
        "reward": pa.array(rewards, pa.float64()),
        "rule": _texts([p.rule for p in prompts]),
        "source": _texts([p.source for p in prompts]),
        "reward_parts": pa.array(
            [list(c.reward_parts.items()) for c in completions], schema.field("reward_parts").type
        ),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _texts(values: Sequence[str | None]) -> pa.Array:
    """A text may hold half of a surrogate pair (JSON can escape one), which strict UTF-8 refuses."""
    encoded = [None if value is None else value.encode("utf-8", "surrogatepass") for value in values]
    return pa.array(encoded, pa.binary()).view(pa.string())


def _lists(arrays: Sequence[np.ndarray], null: Sequence[bool] | None = None) -> pa.ListArray:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    mask = None if null is None else pa.array(null, pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)), mask=mask)


def _read_header(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise ValueError("it has no header")
    checksum, text = metadata[METADATA_KEY][:8], metadata[METADATA_KEY][8:]
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("its header has another checksum")
    header = json.loads(text)
    if header["format"] not in SCHEMAS:
        raise ValueError(f"format {header['format']}, this version reads {' and '.join(map(str, SCHEMAS))}")
    return header


@functools.cache
def _written_schema(written: int) -> pq.ParquetSchema:
    """Parquet's own types of the format's schema, which no checksum of a file covers."""
    empty = pa.BufferOutputStream()
    pq.write_table(SCHEMAS[written].empty_table(), empty)
    return pq.ParquetFile(pa.BufferReader(empty.getvalue())).schema


def _row_groups(file: pq.ParquetFile, written: int) -> Iterator[pa.RecordBatch]:
    """In the columns of this version, null where the file lacks one."""
    for index in range(file.num_row_groups):
        table = file.read_row_group(index).cast(SCHEMAS[written])
        for column in ADDED:
            if column.name not in table.column_names:
                table = table.append_column(column, pa.nulls(len(table), column.type))
        yield pa.RecordBatch.from_arrays(
            [column.combine_chunks() for column in table.columns], names=table.column_names
        )


def _decode(batch: pa.RecordBatch) -> Iterator[Row]:
    plain = {
        name: batch[name].to_pylist() for name in ("position", "row", "number", "seed", "correct", "reward")
    }
    plain |= {name: _read_texts(batch[name]) for name in TEXTS}
    parts = batch["reward_parts"].to_pylist()
    lists = {
        name: _read_lists(batch[name])
        for name in ("prompt_tokens", "tokens", "logprobs", "trained", "versions", "version_tokens")
    }
    all_trained = batch["trained"].is_null().to_pylist()
    prompt: Prompt | None = None
    for i in range(len(batch)):
        if prompt is None or prompt.position != plain["position"][i]:  # one for all completions of a group
            prompt = Prompt(
                position=plain["position"][i],
                row=plain["row"][i],
                text=plain["prompt"][i],
                answer=plain["answer"][i],
                tokens=tuple(lists["prompt_tokens"][i].tolist()),
                rule=plain["rule"][i],
                source=plain["source"][i],
            )
        tokens = lists["tokens"][i]
        runs = zip(lists["versions"][i].tolist(), lists["version_tokens"][i].tolist(), strict=True)
        completion = Completion(
            tokens=tokens,
            logprobs=lists["logprobs"][i],
            # one element seen many times: a mask that costs no memory
            trained=np.broadcast_to(np.True_, len(tokens)) if all_trained[i] else lists["trained"][i],
            finish_reason=plain["finish_reason"][i],
            versions=tuple(runs),
            number=plain["number"][i],
            seed=plain["seed"][i],
            reward_parts=dict(parts[i] or ()),
        )
        yield prompt, completion, plain["correct"][i], plain["reward"][i]


def _read_texts(column: pa.Array) -> list[Any]:
    values = column.view(pa.binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "surrogatepass") for value in values]


def _read_lists(column: pa.ListArray) -> list[np.ndarray]:
    """An array of its own for each row, all in one piece of memory; empty where the row is null."""
    values = np.array(column.values.to_numpy(zero_copy_only=False))
    return [values[begin:end] for begin, end in pairwise(column.offsets.to_pylist())]


def _groups(rows: Sequence[Row], sizes: Sequence[int]) -> list[Group]:
    if len(rows) != sum(sizes):
        raise ValueError(f"{len(rows)} of {sum(sizes)} completions")
    groups, begin = [], 0
    for size in sizes:
        mine = rows[begin : begin + size]
        begin += size
        _, completions, correct, rewards = zip(*mine, strict=True)
        groups.append(Group(prompt=mine[0][0], completions=completions, correct=correct, rewards=rewards))
    return groups
