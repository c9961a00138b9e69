"""The memory that a worker keeps open: one carrier's at a time, and none that is gone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_dapo.sync.manifest import Manifest
from megatron_dapo.sync.staging_memory import StagingMemory
from megatron_dapo.sync.vllm import carrier_memory
from megatron_dapo.sync.vllm.carrier_memory import CarrierMemory


def manifest(path: str, offset: int = 4, num_bytes: int = 8) -> Manifest:
    return Manifest(
        version=1,
        table="af",
        path=path,
        offset=offset,
        num_bytes=num_bytes,
        dtype_whole="float32",
        pieces=(),
    )


def carrier(value: int) -> StagingMemory:
    memory = StagingMemory(64)
    memory.bytes.fill_(value)
    return memory


@pytest.fixture
def num_mapped(monkeypatch) -> Callable[[], int]:
    """How often memory was mapped."""
    calls, mapped = [], carrier_memory._mapped
    monkeypatch.setattr(carrier_memory, "_mapped", lambda path: calls.append(path) or mapped(path))
    return lambda: len(calls)


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("megatron_dapo_weights")


def test_it_stays_mapped_and_shows_what_is_written_later(num_mapped):
    own, memory = carrier(1), CarrierMemory()
    for value in (1, 2, 3):
        own.bytes.fill_(value)
        memory.release()
        assert memory.chunk(manifest(own.path)).tolist() == [value] * 8
    assert memory.chunk(manifest(own.path, 60, 4)).tolist() == [3] * 4
    assert num_mapped() == 1


def test_other_memory_under_the_same_path_is_not_taken_for_the_first(num_mapped):
    first, memory, before = carrier(1), CarrierMemory(), mappings()
    memory.chunk(manifest(first.path))
    first.close()
    second = carrier(2)
    assert second.path == first.path
    assert memory.chunk(manifest(second.path)).tolist() == [2] * 8
    assert num_mapped() == 2 and mappings() == before + 1


def test_the_path_of_a_link_to_other_memory(tmp_path, num_mapped):
    """The same, with memory that is still there."""
    one, other, memory = carrier(1), carrier(2), CarrierMemory()
    link = tmp_path / "link"
    for own in (one, other, one):
        link.unlink(missing_ok=True)
        os.symlink(own.path, link)
        assert memory.chunk(manifest(str(link))).tolist() == own.bytes[:8].tolist()
    assert num_mapped() == 3


def test_what_is_gone_is_unmapped_when_an_update_begins():
    memory, before = CarrierMemory(), mappings()
    own = carrier(1)
    memory.chunk(manifest(own.path))
    memory.release()
    assert mappings() == before + 2
    own.close()
    memory.release()
    assert mappings() == before
    with pytest.raises(FileNotFoundError):
        memory.chunk(manifest(own.path))
    again = carrier(3)
    assert memory.chunk(manifest(again.path)).tolist() == [3] * 8


@pytest.mark.parametrize(("offset", "num_bytes"), [(60, 5), (65, 0)])
def test_a_chunk_beyond_the_memory_is_refused(offset, num_bytes):
    own, memory = carrier(1), CarrierMemory()
    with pytest.raises(ValueError, match=rf"offset={offset}, num_bytes={num_bytes} must lie in the 64 bytes"):
        memory.chunk(manifest(own.path, offset, num_bytes))


def test_the_memory_of_a_gpu_is_closed_when_an_update_begins(monkeypatch):
    closed: list[str] = []

    class Opened:
        def __init__(self, path: str) -> None:
            self.path, self.bytes = path, torch.arange(64, dtype=torch.uint8)

        def close(self) -> None:
            closed.append(self.path)

    monkeypatch.setattr(carrier_memory, "OpenedDeviceMemory", Opened)
    memory = CarrierMemory()
    for path in ("cuda:a", "cuda:a", "cuda:b"):
        assert memory.chunk(manifest(path)).tolist() == list(range(4, 12))
    assert closed == ["cuda:a"]
    memory.release()
    assert closed == ["cuda:a", "cuda:b"]
    memory.release()
    memory.close()
    assert closed == ["cuda:a", "cuda:b"]
