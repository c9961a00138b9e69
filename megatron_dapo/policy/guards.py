"""Numerical guards of an update: NaN and infinity in loss, gradients and parameters are noticed, named with
their rank, and acted on.

In the good case an update pays for one norm over its gradients, one over its parameters, and two reductions
of a flag.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads

from megatron_dapo.config import OptimizerConfig
from megatron_dapo.errors import UserError
from megatron_dapo.policy.model import named_shards
from megatron_dapo.policy.session import Session
from megatron_dapo.types import Batch

WINDOW = 64  # updates whose gradient norms a spike is compared with
LEAST = 8  # of them that must be there


class NotFinite(UserError):
    """Loss, gradient or parameter is NaN or infinite; the parameters are those before the update unless the
    message says otherwise.
    """


@contextmanager
def kept_if_not_finite(batch: Batch | None, path: Path) -> Iterator[None]:
    """A NotFinite from inside names `path`, which then holds the whole batch; the one rank that has it writes
    it.
    """
    try:
        yield
    except NotFinite as error:
        if batch is not None:
            torch.save(batch, path)
        raise NotFinite(f"{error}; the batch is in {path}") from error


class Guard:
    """What one rank knows of the updates so far. Methods marked collective are called by all ranks and decide
    the same on each.
    """

    def __init__(self, config: OptimizerConfig, session: Session, *, name: str = "policy") -> None:
        self.config = config
        self.prefix = "" if name == "policy" else f"{name}, "  # of what it says
        self.session = session
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped_in_a_row = 0
        self._named: list[tuple[str, torch.nn.Parameter]] = []  # this rank's parameters, from input to output
        self._norms_P = torch.empty(0)  # of this rank's own gradients

    def finalize(self, chunks: list[Any], *arguments: Any, **options: Any) -> None:
        """Megatron's `finalize_model_grads`, which adds up the ranks' gradients: whose were finite is noted
        first.
        """
        self._named = list(named_shards(chunks))
        self._norms_P = _norms([cast(Any, parameter).main_grad for _, parameter in self._named])
        finalize_model_grads(chunks, *arguments, **options)

    def describe_nonfinite(
        self, loss: float, losses_M: Sequence[float], grad_norm: float, batch: Batch
    ) -> str:
        """Collective. What is not finite in the loss or the gradient, as a clause; empty when all is well.

        `loss` is the sum over all ranks, `losses_M` those of this rank's micro-batches, `batch` this rank's
        part.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss} ({self._why_loss(losses_M, batch)})"
        bad_P = ~self._norms_P.isfinite()
        if not self._any(not math.isfinite(grad_norm) or bool(bad_P.any())):
            return ""
        names = [name for (name, _), bad in zip(self._named, bad_P.tolist(), strict=True) if bad]
        backward = [f"gradient of {name}" for name in reversed(names)]  # in the order of the backward pass
        where = self._by_rank(backward) or "that of each rank is finite, their sum is not"
        return f"the gradient is not finite (norm {grad_norm}; {where})"

    def _why_loss(self, losses_M: Sequence[float], batch: Batch) -> str:
        """Collective. The first bad value of the batch, then bad parameters or else bad micro-batches, by
        rank.
        """
        session = self.session
        speaks = (
            session.reports_loss and session.cp_rank == 0
        )  # for a replica, whose ranks have the same part
        clauses = [self._by_rank(_bad_inputs(batch) if speaks else [])]
        bad_losses = [
            f"loss of micro-batch {m}" for m, value in enumerate(losses_M) if not math.isfinite(value)
        ]
        clauses.append(
            self._by_rank(self._bad_parameters())
            or self._by_rank(bad_losses)
            or "each rank's is finite, their sum is not"
        )
        return "; ".join(filter(None, clauses))

    def skip(self, problem: str, update: int) -> str:
        """Count an update that is left out because of `problem` (a clause) and return the warning. NotFinite
        when no update is to be left out, or this is one too many.
        """
        text = f"{self.prefix}update {update}: {problem}; the weights were not changed"
        if self.config.on_nonfinite == "stop":
            raise NotFinite(text)
        if self.skipped_in_a_row == self.config.max_skipped:
            raise NotFinite(
                f"{text}, and optimizer.max_skipped={self.config.max_skipped} updates were skipped just "
                f"before"
            )
        self.skipped_in_a_row += 1
        return f"{text}, the update is skipped ({self.skipped_in_a_row} in a row)"

    def check_parameters(self, update: int) -> None:
        """Collective. NotFinite names the parameters that this update spoilt: there is nothing left to go on
        with.
        """
        norms_P = _norms([parameter.detach() for _, parameter in self._named])
        if not self._any(not bool(norms_P.isfinite().all())):
            return
        if where := self._by_rank(self._bad_parameters()):  # else a norm has overflowed, nothing more
            raise NotFinite(
                f"{self.prefix}after update {update} the weights are not finite ({where}); resume from the "
                "last checkpoint"
            )

    def spike(self, grad_norm: float, update: int) -> str:
        """The warning when this norm is far above those recorded before it, else ''. Changes nothing."""
        usual = median(self.norms) if len(self.norms) >= LEAST else math.inf
        times = grad_norm / usual if usual else 1.0
        if self.config.spike_factor is None or times <= self.config.spike_factor:
            return ""
        return (
            f"{self.prefix}update {update}: the gradient norm is {grad_norm:.4g}, "
            f"{times:.1f} times the median of the updates before"
        )

    def record(self, grad_norm: float) -> None:
        """Remember the norm of a good update, which also ends a row of skipped ones."""
        self.norms.append(grad_norm)
        self.skipped_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the same on every rank."""
        return {"norms": list(self.norms), "skipped_in_a_row": self.skipped_in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.skipped_in_a_row = state["skipped_in_a_row"]

    def _bad_parameters(self) -> list[str]:
        return [
            f"parameter {name}" for name, parameter in self._named if not parameter.detach().isfinite().all()
        ]

    def _any(self, flag: bool) -> bool:
        """Collective. Whether any rank says so."""
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.session.control)
        return bool(flags)

    def _by_rank(self, own: list[str]) -> str:
        """Collective. The first clause of each rank that has any: 'rank 1: gradient of output_layer.weight
        and 9 more'.
        """
        of_ranks: list[Any] = [None] * dist.get_world_size(self.session.control)
        dist.all_gather_object(of_ranks, (own[:1], len(own) - 1), group=self.session.control)
        parts = [
            f"rank {r}: {first[0]}" + (f" and {more} more" if more else "")
            for r, (first, more) in enumerate(of_ranks)
            if first
        ]
        return "; ".join(parts[:8]) + (f"; and {len(parts) - 8} more ranks" if len(parts) > 8 else "")


def _norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One norm per tensor. It is finite only where every element is, and overflows for elements beyond about
    1e19.
    """
    return torch.stack(torch._foreach_norm(tensors))  # type: ignore[arg-type]


def _bad_inputs(batch: Batch) -> list[str]:
    """The first value that is not finite of each kind, among the trained tokens of this rank's part of the
    batch.
    """
    ends_N = torch.tensor(batch.lengths, dtype=torch.int64).cumsum(0)
    clauses = []
    for name, values_T in {"advantages": batch.advantages_T, **batch.streams}.items():
        bad = (batch.response_mask_T & ~values_T.isfinite()).nonzero()
        if len(bad):
            i = int(torch.bucketize(bad[0, 0], ends_N, right=True))
            token = int(bad[0, 0]) - (int(ends_N[i - 1]) if i else 0)
            clauses.append(
                f"{name} of sample {int(batch.number_N[i])} of the prompt at position "
                f"{int(batch.prompt_N[i])}, token {token}, is {float(values_T[bad[0, 0]])}"
            )
    return clauses
