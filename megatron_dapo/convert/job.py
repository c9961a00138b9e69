"""A conversion, file by file: shared by worker processes and hosts, resumed after a kill, never half done.

Everything is written to `OUT.partial/`, which is renamed at the end. `.convert/` in it has the job's
description, and for each finished file a record with its size and checksum: a later start keeps the files
that still match theirs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash

from megatron_dapo.convert import writer_lock
from megatron_dapo.convert.checkpoint import FORMATS, open_checkpoint
from megatron_dapo.convert.mapping import read_spec
from megatron_dapo.convert.outputs import HfOutput, MegatronOutput, Output, Record
from megatron_dapo.convert.tensors import Reader
from megatron_dapo.errors import UserError

SHARD_BYTES = 2 << 30  # of a file; a larger tensor makes a file alone
_SPARE_BYTES = 64 << 20  # for index, tokenizer, records
_READ_BYTES = _WRITE_BYTES = 1 << 20  # small enough for a processor's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to convert. `hf_source`: the Hugging Face folder of the same model, with config.json and
    tokenizer. `dtype`: fp32, bf16, fp16, or None to leave it as it is.
    """

    to: Literal["hf", "megatron"]
    source: Path
    hf_source: Path
    out: Path
    dtype: str | None = None
    shard_bytes: int = SHARD_BYTES
    allow_nan: bool = False

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def records(self) -> Path:
        return self.partial / ".convert"


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of the work of one process: every `of`-th file from `number` on."""

    number: int = 0
    of: int = 1

    def of_files(self, files: Iterable[Any]) -> list[Any]:
        return list(files)[self.number :: self.of]


class Conversion:
    """A job whose checkpoints are open: what goes into which file."""

    def __init__(self, job: Job) -> None:
        self.job = job
        source, model = open_checkpoint(job.source), read_spec(job.hf_source)
        if (source.format == "hf") == (job.to == "hf"):
            wanted = "a Megatron checkpoint" if job.to == "hf" else "a Hugging Face folder"
            raise UserError(f"{source.folder} is {FORMATS[source.format]}; give {wanted}")
        if job.to == "hf":
            self._output: Output = HfOutput(source.tensors, model, source.folder, job.hf_source, job.dtype)
        else:
            self._output = MegatronOutput(source.tensors, model, job.hf_source, job.dtype)
        entries = self._output.entries
        cuts = _cut({name: entry.num_bytes for name, entry in entries.items()}, job.shard_bytes)
        self.files = {self._output.file_name(n, len(cuts)): names for n, names in enumerate(cuts)}
        self.num_bytes = sum(entry.num_bytes for entry in entries.values())
        self._source_files = {block.file for tensor in source.tensors.values() for block in tensor.blocks}

    def share_bytes(self, share: Share) -> int:
        """Of the values in the share's files."""
        entries = self._output.entries
        return sum(entries[name].num_bytes for names in share.of_files(self.files.values()) for name in names)

    def start(self, launch: str | None) -> int:
        """Lock the folder and write the job's description, or compare it with that of a killed conversion.
        Returns the lock. UserError when the target exists, another writer is at work, another job was begun
        there, or the disk is too small.
        """
        job = self.job
        check_target(job.out)
        job.records.mkdir(parents=True, exist_ok=True)
        (job.partial / self._output.subfolder).mkdir(exist_ok=True)
        lock = writer_lock.take(job.records / "lock", launch)
        try:
            check_target(job.out)  # another one may have finished meanwhile
            self._describe()
            self._check_disk()
        except BaseException:
            os.close(lock)
            raise
        return lock

    def write_share(self, share: Share, report: Callable[[int], None]) -> None:
        """Write this process's files, but for those that are there and whole. report(bytes written)."""
        reader = Reader()
        try:
            for file, names in share.of_files(self.files.items()):
                if not self._kept(file, report):
                    self._write(file, names, reader, report)
        finally:
            reader.close()

    def say_done(self, rank: int, launch: str) -> None:
        """For rank 0, which finishes when every rank has said it."""
        _replace(self.job.records / f"rank{rank}.done", launch)

    def all_done(self, world: int, launch: str) -> bool:
        paths = (self.job.records / f"rank{rank}.done" for rank in range(world))
        return all(path.is_file() and path.read_text() == launch for path in paths)

    def finish(self) -> dict[str, Any]:
        """Index and the other small files, then the final name. UserError for NaN, unless it is allowed."""
        job, records = self.job, {file: self._read_record(file) for file in self.files}
        nans = {name: n for record in records.values() for name, n in record["nan"].items()}
        if nans and not job.allow_nan:
            raise UserError(
                f"{job.source} has NaN in {len(nans)} tensors: {_list_nans(nans)}; repair it, or convert it "
                f"as it is with --allow-nan (the files in {job.partial} are kept)"
            )
        self._output.finish(job.partial, records)
        os.rename(job.partial, job.out)
        shutil.rmtree(job.out / job.records.name)
        return {"out": str(job.out), "files": len(records), "bytes": self.num_bytes, "nan": nans}

    def _write(self, file: str, names: Sequence[str], reader: Reader, report: Callable[[int], None]) -> None:
        target, nans = self._path(file), dict.fromkeys(names, 0)
        temporary = target.with_name(target.name + ".part")

        def pieces(name: str):
            entry = self._output.entries[name]
            for piece in reader.pieces(name, entry.source):
                nans[name] += count_nan(piece)
                yield piece.to(entry.dtype)

        try:
            with open(temporary, "wb", buffering=0) as raw:
                stream = _Stream(raw, report)
                record = self._output.write(stream, names, pieces)
                os.fsync(raw.fileno())
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"{temporary} cannot be written: {error.strerror}; what is finished is kept, start it again"
            ) from error
        os.rename(temporary, target)
        record |= {"bytes": stream.tell(), "xxh3": stream.digest()}
        record["nan"] = {name: count for name, count in nans.items() if count}
        _replace(self._record_path(file), json.dumps(record))

    def _kept(self, file: str, report: Callable[[int], None]) -> bool:
        """Whether an earlier start finished the file and it still is what was written."""
        if not self._record_path(file).is_file():
            return False
        record, path = self._read_record(file), self._path(file)
        if not path.is_file() or path.stat().st_size != record["bytes"] or digest(path) != record["xxh3"]:
            self._record_path(file).unlink()
            return False
        report(record["bytes"])
        return True

    def _describe(self) -> None:
        """job.json, equal on every rank and at every start."""
        stamps = sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in self._source_files)
        told = {k: str(v) for k, v in dataclasses.asdict(self.job).items() if k not in ("allow_nan", "out")}
        told["source files"] = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
        path = self.job.records / "job.json"
        if not path.is_file():
            _replace(path, json.dumps(told))
        elif (before := json.loads(path.read_text())) != told:
            changed = ", ".join(key for key in told if told[key] != before.get(key))
            raise UserError(
                f"{self.job.partial} is the beginning of another conversion ({changed} differ); delete it, "
                "or write to another --out"
            )

    def _check_disk(self) -> None:
        written = sum(self._path(f).stat().st_size for f in self.files if self._path(f).is_file())
        needed = max(0, self.num_bytes - written) + _SPARE_BYTES
        free = shutil.disk_usage(self.job.partial).free
        if free < needed:
            raise UserError(
                f"{self.job.out} needs {needed / 1e9:.2f} GB more, its disk has {free / 1e9:.2f} GB free; "
                "free space or choose another --out"
            )

    def _path(self, file: str) -> Path:
        return self.job.partial / self._output.subfolder / file

    def _record_path(self, file: str) -> Path:
        return self.job.records / f"{file}.json"

    def _read_record(self, file: str) -> Record:
        return json.loads(self._record_path(file).read_text())


def count_nan(values: torch.Tensor) -> int:
    """The sum, which is much faster, tells whether there is one to count."""
    return int(values.isnan().sum()) if values.is_floating_point() and values.sum().isnan() else 0


def digest(file: Path) -> str:
    """xxh3 of a file, hex."""
    state = xxhash.xxh3_64()
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


class _Stream:
    """A file that is written from front to back, with its checksum."""

    def __init__(self, raw: Any, report: Callable[[int], None]) -> None:
        self._raw, self._report, self._at, self._state = raw, report, 0, xxhash.xxh3_64()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), _WRITE_BYTES):
            part = view[begin : begin + _WRITE_BYTES]
            self._state.update(part)
            self._at += len(part)
            self._report(len(part))
            while part:
                part = part[self._raw.write(part) :]
        return len(view)

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Nothing is held back; torch.save asks for it."""

    def digest(self) -> str:
        return self._state.hexdigest()


def _cut(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, in runs of at most `limit` bytes; a larger one is alone."""
    runs, used = [[]], 0
    for name, size in sizes.items():
        if runs[-1] and used + size > limit:
            runs.append([])
            used = 0
        runs[-1].append(name)
        used += size
    return runs


def check_target(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} exists; nothing is overwritten: delete it or choose another")


def _list_nans(nans: Mapping[str, int]) -> str:
    shown = [f"{name} ({count})" for name, count in list(nans.items())[:5]]
    return ", ".join(shown) + (", ..." if len(nans) > 5 else "")


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, also when several ranks write the same."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
