"""A conversion needs memory for its largest tensor, not for the model (/proc/self/status, Linux)."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.convert_runs import SPARSE_SIZES, sparse_model

from megatron_dapo.convert import workers
from megatron_dapo.convert.job import Job

MIB = 1 << 20


def convert_and_measure(job: Job, results: Any) -> None:
    """Resident memory at its peak, over what it was before, bytes."""

    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    torch.zeros(1).view(torch.uint8).numpy()  # numpy is loaded
    before = resident("VmRSS")
    workers.convert(job, environment={})
    results.put(resident("VmHWM") - before)


def peak(job: Job) -> int:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=convert_and_measure, args=(job, results))
    process.start()
    process.join(500)
    assert process.exitcode == 0
    return results.get()


def check(folder: Path, *, layers: int, vocab: int) -> None:
    model = sparse_model(folder / "model", layers, vocab)
    largest = max(vocab, 2 * SPARSE_SIZES["intermediate_size"]) * SPARSE_SIZES["hidden_size"] * 2
    there = Job(to="megatron", source=model, hf_source=model, out=folder / "there")
    back = Job(to="hf", source=there.out, hf_source=model, out=folder / "back")
    assert peak(there) < largest + 128 * MIB
    assert peak(back) < 128 * MIB


def test_a_model_needs_its_largest_tensor(tmp_path):
    check(tmp_path, layers=1, vocab=32_000)  # 0.65 GB, the largest tensor has 0.26 GB


@pytest.mark.slow
def test_four_gigabytes(tmp_path):
    check(tmp_path, layers=7, vocab=152_064)  # 4.0 GB, the embedding has 1.25 GB
