"""How many and which digests differ: engines against a server that loaded the export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dapo.errors import UserError
from megatron_dapo.sync.verify import SyncMismatch, compare_digests

EXPORT = Path("/run/hf")
LOADED = {"norm": "11", "qkv": "22", "head": "33"}


def write(folder: Path, server: str, file: str, digests: dict[str, str]) -> None:
    (folder / server).mkdir(exist_ok=True)
    (folder / server / f"{file}.json").write_text(json.dumps(digests))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two engines of two tensor-parallel ranks that hold what was pushed."""
    for rank in (0, 1):
        values = LOADED | {"qkv": f"2{rank}"}
        write(tmp_path, "fresh", f"tp{rank}-load", values)
        for engine in ("engine_0", "engine_1"):
            write(tmp_path, engine, f"tp{rank}-v4", values)
            write(tmp_path, engine, f"tp{rank}-v3", dict.fromkeys(values, "old"))
    return tmp_path


def compare(folder: Path, version: int = 4) -> int:
    engines = ["engine_0", "engine_1"]
    return compare_digests(folder, engines, tensor_parallel=2, version=version, export=EXPORT)


def test_equal_engines_are_counted(folder):
    assert compare(folder) == 3 * 2 * 2


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (LOADED | {"qkv": "other"}, "1 of 3 parameters: qkv"),
        ({"norm": "11", "qkv": "21"}, "1 of 3 parameters: head"),
        (LOADED | {"qkv": "21", "more": "44"}, "1 of 3 parameters: more"),
        ({name: "other" for name in LOADED}, "3 of 3 parameters: head, norm, qkv"),
    ],
)
def test_a_difference_names_engine_rank_and_parameters(folder, held, words):
    write(folder, "engine_1", "tp1-v4", held)
    with pytest.raises(SyncMismatch) as failure:
        compare(folder)
    assert str(failure.value) == (
        f"after weight push 4, engine_1 (tensor-parallel rank 1) differs from {EXPORT} in {words}"
    )
    assert isinstance(failure.value, UserError)


def test_digests_of_another_push_do_not_count(folder):
    with pytest.raises(SyncMismatch, match=r"after weight push 3, engine_0"):
        compare(folder, version=3)
    with pytest.raises(SyncMismatch, match=r"engine_0/tp0-v5\.json is missing.*run\.verify_sync"):
        compare(folder, version=5)


def test_at_most_ten_names(folder):
    names = [f"p{i:02}" for i in range(12)]
    write(folder, "fresh", "tp0-load", dict.fromkeys(names, "1"))
    write(folder, "engine_0", "tp0-v4", dict.fromkeys(names, "2"))
    with pytest.raises(SyncMismatch, match=f"12 of 12 parameters: {', '.join(names[:10])}$"):
        compare(folder)
