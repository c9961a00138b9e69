"""`bench.py logprob`: log-probabilities from hidden states (see tools/bench.py)."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.resources import memory, reset_peak
from megatron_dapo.batching.logprobs import logprobs_from_hidden

Logprobs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of hidden, weight, labels


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden_RH = torch.randn(options.tokens, options.hidden, requires_grad=True)
    weight_VH = torch.randn(options.vocab, options.hidden).mul_(options.hidden**-0.5).requires_grad_()
    labels_R, arriving_R = torch.randint(options.vocab, (options.tokens,)), torch.randn(options.tokens)

    def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logprobs_from_hidden(hidden, weight, labels, vocab_size=options.vocab)[0]

    def measure(function: Logprobs) -> tuple[float, int, tuple[torch.Tensor, ...]]:
        """Seconds, peak bytes, the two gradients."""
        hidden, weight = (x.detach()[:4].requires_grad_() for x in (hidden_RH, weight_VH))
        function(hidden, weight, labels_R[:4] % 4).sum().backward()  # libraries start up
        before, start = reset_peak(), time.perf_counter()
        logprobs_R = function(hidden_RH, weight_VH, labels_R)
        peak, middle = memory("VmHWM"), time.perf_counter()
        reset_peak()
        between = time.perf_counter()
        gradients = torch.autograd.grad((logprobs_R * arriving_R).sum(), (hidden_RH, weight_VH))
        seconds = time.perf_counter() - between + middle - start
        return seconds, max(peak, memory("VmHWM") - sum(g.nbytes for g in gradients)) - before, gradients

    by_repeat: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        seconds, peak, gradients = measure(ours)
        plain_seconds, plain_peak, plain_gradients = measure(plain)
        pairs = zip(gradients, plain_gradients, strict=True)
        error = max(float((g - p).abs().max() / p.abs().max()) for g, p in pairs)
        now = {
            "peak_extra_bytes": peak,
            "plain_peak_extra_bytes": plain_peak,
            "seconds": seconds,
            "plain_seconds": plain_seconds,
        }
        for key, value in {**now, "max_grad_error": error}.items():
            by_repeat.setdefault(key, []).append(value)
        del gradients, plain_gradients, pairs
    return {key: statistics.median(values) for key, values in by_repeat.items()}


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
