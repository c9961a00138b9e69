"""The policy: the streams that an objective needs, its updates, and the models beside it. Which algorithm the
objective is, nothing here knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_dapo.config import RunConfig
from megatron_dapo.metrics import Columns, Metric, merge
from megatron_dapo.model_spec import read_model
from megatron_dapo.objectives.base import LossTerms, Objective, TokenInputs
from megatron_dapo.policy import model as model_file
from megatron_dapo.policy import rules
from megatron_dapo.policy.forward import MicroBatch
from megatron_dapo.policy.reference import ReferenceModel
from megatron_dapo.policy.session import Session
from megatron_dapo.policy.trained import TrainedModel
from megatron_dapo.policy.value import ValueModel
from megatron_dapo.types import Batch, StepResult, Stream, UpdateResult
from megatron_dapo.weights.hf import resolve_folder
from megatron_dapo.weights.slices import Shard


class Policy(TrainedModel):
    """The model that is trained, with the models beside it that its objective needs."""

    reference: ReferenceModel | None = None
    value_model: ValueModel | None = None

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
        super().__init__(
            config,
            session,
            folder,
            spec,
            chunks,
            optimizer=config.optimizer,
            columns=Columns.of(metrics_of(objective)),
        )
        self.objective = objective
        if Stream.REFERENCE_LOGPROBS in objective.needs:
            self.reference = ReferenceModel(config, session)
        if Stream.VALUES in objective.needs:
            self.value_model = ValueModel(config, session)

    def trained_models(self) -> list[TrainedModel]:
        """The policy, and its value model if it has one."""
        return [self, self.value_model] if self.value_model else [self]

    def streams(self, batch: Batch) -> Batch:
        """The batch with the streams that the objective needs before the first update.

        Old log-probabilities are computed only for a step of several updates, or if the objective reads them
        beforehand: in a single one they are those of the update itself.
        """
        objective, missing = self.objective, self.objective.needs - batch.streams.keys()
        if Stream.OLD_LOGPROBS in missing and (len(batch.mini_batches) > 1 or objective.old_before_update):
            batch = batch.with_stream(Stream.OLD_LOGPROBS, self.logprobs(batch))
        if self.reference and Stream.REFERENCE_LOGPROBS in missing:
            batch = batch.with_stream(Stream.REFERENCE_LOGPROBS, self.reference.logprobs(batch))
        if self.value_model and Stream.VALUES in missing:
            batch = batch.with_stream(Stream.VALUES, self.value_model.values(batch))
        if objective.prepare is not None:
            batch = objective.prepare(batch, self._sum_over_parts)
        others = objective.needs - batch.streams.keys() - {Stream.OLD_LOGPROBS}
        assert not others, (
            f"the objective needs {sorted(others)}, which another model has to add to the batch"
        )
        return batch

    def update(self, batch: Batch, k: int) -> UpdateResult:
        """As of any trained model; one of the value model too, where there is one. While that is trained
        alone (objective.value_pretraining_steps) the policy's is left out.
        """
        if self.value_model is None:
            return super().update(batch, k)
        alone = self.value_model.is_alone
        of_values = self.value_model.update(batch, k)
        result = self.left_out(batch.mini_batches[k]) if alone else super().update(batch, k)
        metrics = result.metrics | self.value_model.metrics_of(of_values)
        return replace(result, metrics=metrics, warnings=(*of_values.warnings, *result.warnings))

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

    def terms(self, outputs: torch.Tensor, micro: MicroBatch) -> LossTerms:
        return self.objective.loss(self._inputs(outputs, micro))

    def _sum_over_parts(self, own: torch.Tensor) -> torch.Tensor:
        """The sum of what each data-parallel rank has of its part of the batch, on every rank."""
        session = self.session
        total = own.clone() if session.rank == session.replica_leader else torch.zeros_like(own)
        dist.all_reduce(total, group=session.control)
        return total

    def _inputs(self, hidden: torch.Tensor, micro: MicroBatch) -> TokenInputs:
        logprobs_R, entropy_R = self.response_logprobs(
            hidden, micro, entropy_gradient=self.objective.entropy_gradient
        )
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
