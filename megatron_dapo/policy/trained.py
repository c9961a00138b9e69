"""One optimizer update of a model: the policy's, or that of the value model beside it.

A loss returns sums; Megatron divides the gradient once, by the denominator of the whole mini-batch over all
data-parallel ranks, context-parallel ranks and micro-batches (its `calculate_per_token_loss` contract).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_dapo.config import OptimizerConfig, RunConfig
from megatron_dapo.metrics import Columns, Count, Metric
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.objectives.base import LossTerms
from megatron_dapo.policy.forward import MicroBatch
from megatron_dapo.policy.guards import Guard
from megatron_dapo.policy.optimizer import apply_gradients, build_optimizer, build_schedule, ready_gradients
from megatron_dapo.policy.runner import ModelRunner, micro_batches_of
from megatron_dapo.policy.session import Session
from megatron_dapo.types import Batch, MiniBatch, UpdateResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Of one update, over all its micro-batches and ranks. predicted: trained tokens whose log-probability
    was taken. num_tokens: those of them in the loss. excluded: what the objective left out of its
    denominator.
    """

    loss: float
    predicted: int
    num_tokens: int
    excluded: int
    metrics: dict[str, Metric]


class TrainedModel(ModelRunner):
    """A ModelRunner with gradients and an optimizer: the policy, and the value model beside it. Every method
    is collective, and every `batch` is the part of this rank's data-parallel rank (Batch.part).

    columns: the metrics that `terms` reports. name: what warnings and errors call it.
    """

    chunks: list[DistributedDataParallel]

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        folder: Path,
        spec: ModelSpec,
        chunks: list[DistributedDataParallel],
        *,
        optimizer: OptimizerConfig,
        columns: Columns,
        name: str = "policy",
    ) -> None:
        super().__init__(config, session, folder, spec, chunks)
        self.columns = columns
        fp8 = session.backend.megatrons_fp8(config.policy)
        self.optimizer = build_optimizer(optimizer, chunks, config.model.dtype, fp8)
        self.schedule = build_schedule(optimizer, self.optimizer)
        self.guard = Guard(optimizer, session, name=name)
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = self.guard.finalize
            chunk.config.grad_scale_func = self.optimizer.scale_loss
        self.num_updates = 0

    def terms(self, outputs: torch.Tensor, micro: MicroBatch) -> LossTerms:
        """The loss of a micro-batch, from what the last stage returns."""
        raise NotImplementedError

    def denominator(self, mini: MiniBatch) -> int:
        """What the loss of a mini-batch is divided by."""
        return mini.denominator

    def update(self, batch: Batch, k: int) -> UpdateResult:
        """One optimizer update on mini-batch `k`; `batch` has been through `streams`.

        NotFinite is raised on all ranks; with optimizer.on_nonfinite=skip_update the update is left out
        instead, which advances neither `num_updates` nor the schedule. An update without a token in its loss
        is left out always: AdamW would move the weights by their decay and by its moments.
        """
        mini = batch.mini_batches[k]
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports_M = self.run_schedule(batch, k, self._loss_function(mini), forward_only=False)
        totals = self._reduce(reports_M)
        grad_norm = ready_gradients(self.optimizer)
        losses_M = [float(report[0]) for report, _ in reports_M] if self.session.reports_loss else []
        if problem := self.guard.describe_nonfinite(totals.loss, losses_M, grad_norm, batch):
            return self.left_out(mini, self.guard.skip(problem, self.num_updates + 1))
        assert totals.predicted == mini.num_tokens, (totals, mini.num_tokens)
        if not totals.num_tokens:
            why = "the mismatch correction masked all" if mini.num_tokens else "no response is trained on"
            update = f"{self.guard.prefix}update {self.num_updates + 1}"
            text = f"{update}: no token is in the loss ({why}), the update is skipped"
            return self.left_out(mini, text)
        self.schedule.step(increment=1)
        apply_gradients(self.optimizer, self.guard.config.clip_grad, grad_norm)
        self.num_updates += 1
        self.guard.check_parameters(self.num_updates)
        spike = self.guard.spike(grad_norm, self.num_updates)
        self.guard.record(grad_norm)
        return UpdateResult(
            loss=totals.loss / max(self.denominator(mini) - totals.excluded, 1),
            grad_norm=grad_norm,
            num_tokens=totals.num_tokens,
            num_micro_batches=len(micro_batches_of(mini)),
            lr=self.optimizer.param_groups[0]["lr"],
            metrics=totals.metrics
            | {"skipped_updates": Count(0), "grad_norm_spike": Count(1 if spike else 0)},
            warnings=(spike,) if spike else (),
        )

    def _loss_function(self, mini: MiniBatch) -> Callable[..., Any]:
        """The loss of one micro-batch, as Megatron's schedule takes it.

        Megatron divides the gradient by the sum of what micro-batches and ranks return beside their loss. The
        denominator is of the whole mini-batch, so the first micro-batch of the first rank adds it, and each
        takes off what it excluded.
        """
        session = self.session
        first_rank = session.dp_rank == session.cp_rank == 0

        def loss(outputs: torch.Tensor, micro: MicroBatch, number: int) -> tuple[Any, Any, Any]:
            terms = self.terms(outputs, micro)
            denominator = self.denominator(mini) if first_rank and number == 0 else 0
            divisor = (denominator - terms.excluded).to(session.device, torch.int)
            return terms.loss, divisor, self._report(terms, len(micro.labels_R))

        return loss

    def _report(self, terms: LossTerms, predicted: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a micro-batch adds to the totals, as float64 on the host: sums (loss, predicted, num_tokens
        and excluded first, then those of the metrics), and maxima.
        """
        sums, maxima = self.columns.split(terms.metrics)
        own = [terms.loss.detach(), predicted, terms.num_tokens, terms.excluded]
        device = self.session.device
        numbers = [torch.as_tensor(x, device=device).double() for x in (*own, *sums, *maxima)]
        stacked = torch.stack(numbers).cpu()  # one wait for the device
        return stacked[: len(own) + len(sums)], stacked[len(own) + len(sums) :]

    def _reduce(self, reports_M: list[tuple[torch.Tensor, torch.Tensor]]) -> Totals:
        """Over micro-batches and ranks, on every rank."""
        sums = torch.zeros(4 + self.columns.num_sums, dtype=torch.float64)
        maxima = torch.full((self.columns.num_maxima,), -math.inf, dtype=torch.float64)
        if self.session.reports_loss:
            for added, largest in reports_M:
                sums += added
                maxima = torch.maximum(maxima, largest)
        dist.all_reduce(sums, group=self.session.control)
        if len(maxima):
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.session.control)
        loss, *counts = sums[:4].tolist()
        predicted, num_tokens, excluded = map(int, counts)
        return Totals(
            loss=loss,
            predicted=predicted,
            num_tokens=num_tokens,
            excluded=excluded,
            metrics=self.columns.join(sums[4:].tolist(), maxima.tolist()),
        )

    def left_out(self, mini: MiniBatch, warning: str = "") -> UpdateResult:
        """An update that did not happen: counted, and nothing of it in the other metrics."""
        return UpdateResult(
            loss=math.nan,
            grad_norm=math.nan,
            num_tokens=0,
            num_micro_batches=len(micro_batches_of(mini)),
            lr=self.optimizer.param_groups[0]["lr"],
            skipped=True,
            metrics=self.columns.nothing() | {"skipped_updates": Count(1), "grad_norm_spike": Count(0)},
            warnings=(warning,) if warning else (),
        )
