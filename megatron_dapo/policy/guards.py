"""Numerical guards of an update: NaN and infinity in loss, gradients and parameters are found, named with their rank, and acted on.

In the good case an update pays for one norm over its gradients, one over its parameters, and two reductions of a flag.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads

from megatron_dapo.config import OptimizerConfig
from megatron_dapo.policy.model import named_shards
from megatron_dapo.policy.parallel import Place
from megatron_dapo.types import Batch

WINDOW, LEAST = 64, 8  # updates whose gradient norms a spike is compared with, and how few of them are too few


class NotFinite(RuntimeError):
    """Loss, gradient or parameter is NaN or infinite; the parameters are those before the update unless the message says otherwise."""


class Guard:
    """What one rank knows of the updates so far. Methods marked collective are called by all ranks and decide the same on each."""

    def __init__(self, config: OptimizerConfig, place: Place) -> None:
        self.config = config
        self.place = place
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped_in_a_row = 0
        self._named: list[tuple[str, torch.nn.Parameter]] = []  # this rank's parameters, from input to output
        self._norms_P = torch.empty(0)  # of this rank's own gradients

    def finalize(self, chunks: list[Any], *arguments: Any, **options: Any) -> None:
        """Megatron's `finalize_model_grads`, which adds up the ranks' gradients: whose were finite is noted first."""
        self._named = list(named_shards(chunks))
        self._norms_P = _norms([cast(Any, parameter).main_grad for _, parameter in self._named])
        finalize_model_grads(chunks, *arguments, **options)

    def trouble(
        self, loss: float, micro_losses: Sequence[float], grad_norm: float, batch: Batch, old_T: torch.Tensor | None
    ) -> str:
        """Collective. What is not finite in the loss or the gradient, as a clause; empty when all is well.

        `loss` is the sum over all ranks, `micro_losses` those of this rank; `old_T` the old log-probabilities [T] or None.
        """
        if not math.isfinite(loss):
            micros = [f"loss of micro-batch {m}" for m, value in enumerate(micro_losses) if not math.isfinite(value)]
            found = self._by_rank(self._bad_parameters()) or self._by_rank(micros) or "each rank's is finite, their sum is not"
            return f"the loss is {loss} ({'; '.join(filter(None, (_bad_input(batch, old_T), found)))})"
        bad_P = ~self._norms_P.isfinite()
        if not self._any(not math.isfinite(grad_norm) or bool(bad_P.any())):
            return ""
        names = [name for (name, _), bad in zip(self._named, bad_P.tolist(), strict=True) if bad]
        found = self._by_rank([f"gradient of {name}" for name in reversed(names)])  # in the order of the backward pass
        return f"the gradient is not finite (norm {grad_norm}; {found or 'that of each rank is finite, their sum is not'})"

    def skip(self, trouble: str, update: int) -> str:
        """Count an update that is left out and return what to say of it. NotFinite when it is not to be, or is one too many."""
        text = f"update {update}: {trouble}; the weights were not changed"
        if self.config.on_nonfinite == "stop":
            raise NotFinite(text)
        if self.skipped_in_a_row == self.config.max_skipped:
            raise NotFinite(f"{text}, and optimizer.max_skipped={self.config.max_skipped} updates were skipped just before")
        self.skipped_in_a_row += 1
        return f"{text}, the update is skipped ({self.skipped_in_a_row} in a row)"

    def check_parameters(self, update: int) -> None:
        """Collective. NotFinite names the parameters that this update spoilt: there is nothing left to go on with."""
        norms_P = _norms([parameter.detach() for _, parameter in self._named])
        if self._any(not bool(norms_P.isfinite().all())) and (found := self._by_rank(self._bad_parameters())):
            raise NotFinite(f"after update {update} the weights are not finite ({found}); resume from the last checkpoint")

    def spike(self, grad_norm: float, update: int) -> str:
        """Note the norm of a good update. Returns what to say when it is far above those before it, else ''."""
        usual = median(self.norms) if len(self.norms) >= LEAST else math.inf
        self.norms.append(grad_norm)
        self.skipped_in_a_row = 0
        times = grad_norm / usual if usual else 1.0
        if self.config.spike_factor is None or times <= self.config.spike_factor:
            return ""
        return f"update {update}: the gradient norm is {grad_norm:.4g}, {times:.1f} times the median of the updates before"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the same on every rank."""
        return {"norms": list(self.norms), "skipped_in_a_row": self.skipped_in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.skipped_in_a_row = state["skipped_in_a_row"]

    def _bad_parameters(self) -> list[str]:
        return [f"parameter {name}" for name, parameter in self._named if not parameter.detach().isfinite().all()]

    def _any(self, flag: bool) -> bool:
        """Collective. Whether any rank says so."""
        told = torch.tensor(int(flag))
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.place.control)
        return bool(told)

    def _by_rank(self, found: list[str]) -> str:
        """Collective. The first finding of each rank that has one: 'rank 1: gradient of output_layer.weight and 9 more'."""
        told: list[Any] = [None] * dist.get_world_size(self.place.control)
        dist.all_gather_object(told, (found[:1], len(found) - 1), group=self.place.control)
        parts = [f"rank {r}: {first[0]}" + (f" and {more} more" if more else "") for r, (first, more) in enumerate(told) if first]
        return "; ".join(parts[:8]) + (f"; and {len(parts) - 8} more ranks" if len(parts) > 8 else "")


def _norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One norm per tensor. It is finite only where every element is, and overflows for elements beyond about 1e19."""
    return torch.stack(torch._foreach_norm(tensors))  # type: ignore[arg-type]


def _bad_input(batch: Batch, old_T: torch.Tensor | None) -> str:
    """The first value of the batch that is not finite, as every rank sees it."""
    streams = {"advantages_N": batch.advantages_N, "rollout_logprobs_T": batch.rollout_logprobs_T, "old_logprobs_T": old_T}
    for name, stream in streams.items():
        if stream is not None and len(bad := (~stream.isfinite()).nonzero()):
            return f"{name}[{int(bad[0])}] of the batch is {float(stream[bad[0]])}"
    return ""
