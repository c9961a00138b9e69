"""What a process uses, read from Linux; and what this machine can compute."""

from __future__ import annotations

import time
from pathlib import Path

import torch


def memory(key: str) -> int:
    """Bytes of `key` in /proc/self/status: VmRSS (resident now), RssShmem (of that, shared) or
    VmHWM (the most since the last reset).
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def reset_peak() -> int:
    """VmHWM starts again from VmRSS, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def product_ceiling(size: int = 2048) -> float:
    """Floating-point operations a second of a large fp32 matrix product here, the best of five."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])
