"""`tools/bench.py logprob` at a small size: what it prints, and that it sees the logits of all tokens."""

from __future__ import annotations

MIB = 1 << 20


def test_memory_and_gradients(bench_process):
    sizes = ["--tokens", "2048", "--vocab", "30000", "--hidden", "8", "--repeats", "1"]  # logits of 234 MiB
    found = bench_process("logprob", *sizes)
    assert found.keys() == {
        "peak_extra_bytes",
        "plain_peak_extra_bytes",
        "seconds",
        "plain_seconds",
        "max_grad_error",
    }
    assert 2 * 234 * MIB < found["plain_peak_extra_bytes"] < 3.5 * 234 * MIB
    assert 2 * 60 * MIB < found["peak_extra_bytes"] < 2.5 * 64 * MIB  # two blocks
    assert 0 < found["max_grad_error"] < 1e-5
    assert found["seconds"] > 0 and found["plain_seconds"] > 0
