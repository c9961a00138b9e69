"""Memory of a GPU that two processes share, on CUDA itself (tests/sync/test_device_memory.py: on a list)."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch

from megatron_dapo.sync.device_memory import DeviceMemory, OpenedDeviceMemory

NUM_BYTES = 100 << 20


def double(path: str, answers: Any) -> None:
    """In a process that sees the GPUs in another order."""
    memory = OpenedDeviceMemory(path)
    answers.put((int(memory.bytes.sum()), memory.bytes.device.index))
    memory.bytes.mul_(2)
    memory.close()


@pytest.mark.gpu
def test_another_process_reads_and_writes_it(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    numbers = list(range(torch.cuda.device_count()))
    before = torch.cuda.mem_get_info(0)[0]
    own = DeviceMemory(NUM_BYTES, 0)
    own.bytes.fill_(3)
    torch.cuda.synchronize()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, reversed(numbers))))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=double, args=(own.path, answers))
    process.start()
    assert answers.get(timeout=120) == (3 * NUM_BYTES, numbers[-1])
    process.join()
    assert process.exitcode == 0
    assert bool((own.bytes == 6).all())
    own.close()
    assert torch.cuda.mem_get_info(0)[0] > before - NUM_BYTES
