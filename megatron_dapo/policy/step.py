"""The policy: the streams that an objective needs, and one optimizer update.

The objective's loss returns sums; Megatron divides the gradient once, by the denominator of the whole
mini-batch over all data-parallel ranks, context-parallel ranks and micro-batches (its
`calculate_per_token_loss` contract). Which algorithm the objective is, nothing here knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_dapo.config import RunConfig
from megatron_dapo.metrics import Columns, Count, Metric, merge
from megatron_dapo.model_spec import read_model
from megatron_dapo.objectives.base import LossTerms, Objective, TokenInputs
from megatron_dapo.policy import model as model_file
from megatron_dapo.policy import rules
from megatron_dapo.policy.forward import MicroBatch
from megatron_dapo.policy.guards import Guard
from megatron_dapo.policy.optimizer import apply_gradients, build_optimizer, build_schedule, ready_gradients
from megatron_dapo.policy.runner import ModelRunner, micro_batches_of
from megatron_dapo.policy.session import Session
from megatron_dapo.types import Batch, MiniBatch, StepResult, Stream, UpdateResult
from megatron_dapo.weights.hf import resolve_folder
from megatron_dapo.weights.slices import Shard


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


class Policy(ModelRunner):
    """The trained model on this rank: a ModelRunner with gradients and an optimizer. Every method is
    collective, and every `batch` is the part of this rank's data-parallel rank (Batch.part).
    """

    chunks: list[DistributedDataParallel]

    def __init__(self, config: RunConfig, session: Session, objective: Objective) -> None:
        """UserError for what the model, the layout or the device cannot do (policy/rules.py)."""
        folder = resolve_folder(config.model.path)
        spec = read_model(folder)
        rules.check(config, spec, on_cpu=session.backend.name == "cpu")
        chunks = model_file.with_gradients(
            model_file.build(spec, session, config.policy, config.model.dtype, seed=config.run.seed),
            config.policy,
            session.backend,
            distributed_optimizer=config.optimizer.distributed,
        )
        model_file.load_weights(chunks, folder, spec, session)
        super().__init__(config, session, folder, spec, chunks)
        self.objective = objective
        self.columns = Columns.of(metrics_of(objective))
        self.optimizer = build_optimizer(
            config.optimizer,
            chunks,
            config.model.dtype,
            session.backend.megatrons_fp8(config.policy),
        )
        self.schedule = build_schedule(config.optimizer, self.optimizer)
        self.guard = Guard(config.optimizer, session)
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = self.guard.finalize
            chunk.config.grad_scale_func = self.optimizer.scale_loss
        self.num_updates = 0

    def streams(self, batch: Batch) -> Batch:
        """The batch with the streams that the objective needs before the first update.

        Old log-probabilities are computed only for a step of several updates: in a single one they are those
        of the update itself. Streams of other models must be in the batch already.
        """
        missing = self.objective.needs - batch.streams.keys()
        if Stream.OLD_LOGPROBS in missing and len(batch.mini_batches) > 1:
            batch = batch.with_stream(Stream.OLD_LOGPROBS, self.logprobs(batch))
        others = missing - {Stream.OLD_LOGPROBS}
        assert not others, (
            f"the objective needs {sorted(others)}, which another model has to add to the batch"
        )
        return batch

    def update(self, batch: Batch, k: int) -> UpdateResult:
        """One optimizer update on mini-batch `k`; `batch` has been through `streams`.

        NotFinite is raised on all ranks; with optimizer.on_nonfinite=skip_update the update is left out
        instead, which advances neither `num_updates` nor the schedule.
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
            return self._skipped(self.guard.skip(problem, self.num_updates + 1), mini)
        assert totals.predicted == mini.num_tokens, (totals, mini.num_tokens)
        self.schedule.step(increment=1)
        apply_gradients(self.optimizer, self.config.optimizer.clip_grad, grad_norm)
        self.num_updates += 1
        self.guard.check_parameters(self.num_updates)
        spike = self.guard.spike(grad_norm, self.num_updates)
        self.guard.record(grad_norm)
        return UpdateResult(
            loss=totals.loss / max(mini.denominator - totals.excluded, 1),
            grad_norm=grad_norm,
            num_tokens=totals.num_tokens,
            num_micro_batches=len(micro_batches_of(mini)),
            lr=self.optimizer.param_groups[0]["lr"],
            metrics=totals.metrics
            | {"skipped_updates": Count(0), "grad_norm_spike": Count(1 if spike else 0)},
            warnings=(spike,) if spike else (),
        )

    def weight_shards(self) -> list[Shard]:
        """The live parameters that this rank contributes to an export. Call again after every update: with
        overlapped gathers a rank has other ranks' updated weights only after this call.
        """
        model_file.gather_weights(self.chunks)
        return model_file.weight_shards(self.chunks, self.spec, self.session)

    def held_shards(self) -> list[Shard]:
        """All live parameters of this rank, for a push; call again after every update."""
        model_file.gather_weights(self.chunks)
        return model_file.held_shards(self.chunks, self.spec, self.session)

    def _loss_function(self, mini: MiniBatch) -> Callable[..., Any]:
        """The objective's loss of one micro-batch, as Megatron's schedule takes it.

        Megatron divides the gradient by the sum of what micro-batches and ranks return beside their loss. The
        denominator is of the whole mini-batch, so the first micro-batch of the first rank adds it, and each
        takes off what it excluded.
        """
        session = self.session
        first_rank = session.dp_rank == session.cp_rank == 0

        def loss(hidden: torch.Tensor, micro: MicroBatch, number: int) -> tuple[Any, Any, Any]:
            terms = self.objective.loss(self._inputs(hidden, micro))
            denominator = mini.denominator if first_rank and number == 0 else 0
            divisor = (denominator - terms.excluded).to(session.device, torch.int)
            return terms.loss, divisor, self._report(terms, len(micro.labels_R))

        return loss

    def _inputs(self, hidden: torch.Tensor, micro: MicroBatch) -> TokenInputs:
        logprobs_R, entropy_R = self.response_logprobs(hidden, micro)
        streams_R = dict(micro.streams_R)
        if Stream.OLD_LOGPROBS in self.objective.needs and Stream.OLD_LOGPROBS not in streams_R:
            streams_R[Stream.OLD_LOGPROBS] = logprobs_R.detach()  # the policy has not moved in this step yet
        return TokenInputs(
            logprobs_R=logprobs_R,
            entropy_R=entropy_R,
            advantages_R=micro.advantages_R,
            fresh_R=micro.fresh_R,
            samples_R=micro.samples_R,
            num_samples=micro.num_samples,
            streams=streams_R,
            sample_group=self.session.cp_group if self.session.layout.cp > 1 else None,
        )

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

    def _skipped(self, warning: str, mini: MiniBatch) -> UpdateResult:
        """An update that did not happen: counted, and nothing of it in the other metrics."""
        return UpdateResult(
            loss=math.nan,
            grad_norm=math.nan,
            num_tokens=0,
            num_micro_batches=len(micro_batches_of(mini)),
            lr=self.optimizer.param_groups[0]["lr"],
            skipped=True,
            metrics=self.columns.nothing() | {"skipped_updates": Count(1), "grad_norm_spike": Count(0)},
            warnings=(warning,),
        )


def metrics_of(objective: Objective) -> dict[str, Metric]:
    """The metrics that the objective's loss reports, learnt from a loss over no tokens: ranks without a loss
    (earlier pipeline stages) must know them too.
    """
    none = torch.zeros(0)
    streams = {name: none for name in objective.needs | {Stream.ROLLOUT_LOGPROBS}}
    inputs = TokenInputs(
        logprobs_R=none,
        entropy_R=none,
        advantages_R=none,
        fresh_R=torch.zeros(0, dtype=torch.bool),
        samples_R=torch.zeros(0, dtype=torch.int64),
        num_samples=0,
        streams=streams,
    )
    return dict(objective.loss(inputs).metrics)


def combine(results: Sequence[UpdateResult]) -> StepResult:
    """The report of a step: token-weighted means over its updates, skipped ones left out; learning rate of
    the last.
    """
    tokens = sum(r.num_tokens for r in results)
    done = [r for r in results if not r.skipped]

    def mean(values: Sequence[float]) -> float:
        if not done:
            return math.nan
        return sum(r.num_tokens / max(tokens, 1) * v for r, v in zip(done, values, strict=True))

    return StepResult(
        loss=mean([r.loss for r in done]),
        grad_norm=mean([r.grad_norm for r in done]),
        num_tokens=tokens,
        num_updates=len(done),
        num_micro_batches=sum(r.num_micro_batches for r in results),
        lr=results[-1].lr,
        metrics=merge(r.metrics for r in results),
        warnings=tuple(text for r in results for text in r.warnings),
    )
