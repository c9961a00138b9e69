"""The value model of ppo: the policy's architecture with a scalar in the place of the output layer, for each
token the value of the text before it, with an optimizer and a schedule of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch.nn.functional import linear

from megatron_dapo.config import OptimizerConfig, PpoConfig, RunConfig
from megatron_dapo.metrics import Columns, Count, Mean, Metric
from megatron_dapo.model_spec import read_model
from megatron_dapo.objectives.base import LossTerms
from megatron_dapo.objectives.ppo import value_terms
from megatron_dapo.policy import model as model_file
from megatron_dapo.policy.forward import MicroBatch
from megatron_dapo.policy.fp8_rules import with_whole_weights
from megatron_dapo.policy.session import Session
from megatron_dapo.policy.trained import TrainedModel
from megatron_dapo.types import Batch, MiniBatch, Stream, UpdateResult
from megatron_dapo.weights.hf import resolve_folder

HEAD = "output_layer.weight"


class ScalarHead(torch.nn.Module):
    """Hidden states [..., H] to values [..., 1], in fp32. Its weight starts at zero, and is whole on every
    tensor-parallel rank.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden.float(), self.weight.float())


class ValueGPT(model_file.HeadlessGPT):
    """GPTModel whose last stage returns values [T, 1, 1] of all tokens.

    All tensor-parallel ranks compute all of them alike, so that the gradient of the hidden states is whole on
    each, and not a share to be summed as that of logits is.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.post_process:
            self.output_layer = ScalarHead(self.config.hidden_size, self.config.params_dtype)

    def _postprocess(self, hidden_states: torch.Tensor, **unused: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return self.output_layer(hidden_states)


class ValueModel(TrainedModel):
    """Starts from the policy's first weights. `config.objective` is ppo's section."""

    def __init__(self, config: RunConfig, session: Session) -> None:
        config = with_whole_weights(config)
        folder = resolve_folder(config.model.path)
        # tied embeddings would tie the scalar to them
        spec = dataclasses.replace(read_model(folder), tied=False)
        chunks = model_file.with_gradients(
            model_file.build(
                spec, session, config.policy, config.model.dtype, seed=config.run.seed, kind=ValueGPT
            ),
            config.policy,
            session.backend,
            distributed_optimizer=config.optimizer.distributed,
        )
        model_file.load_weights(chunks, folder, spec, session, without=HEAD)
        self._objective = cast(PpoConfig, config.objective)
        none = torch.zeros(0)
        super().__init__(
            config,
            session,
            folder,
            spec,
            chunks,
            optimizer=optimizer_of(config.optimizer, self._objective),
            columns=Columns.of(value_terms(none, none, none, self._objective.value_clip).metrics),
            name="value model",
        )

    @property
    def is_alone(self) -> bool:
        """Whether the next update is one of those that the policy does not take part in."""
        return self.num_updates < self._objective.value_pretraining_steps * self.config.batch.updates_per_step

    def values(self, batch: Batch) -> torch.Tensor:
        """The value of the text before each trained token: [T] over the part, 0 elsewhere. The same tensor on
        every rank of the replica.
        """
        return self.of_tokens(batch, _of_trained_tokens)

    def terms(self, outputs: torch.Tensor, micro: MicroBatch) -> LossTerms:
        values_R = _of_trained_tokens(outputs, micro)
        old_R, returns_R = micro.streams_R[Stream.VALUES], micro.streams_R[Stream.RETURNS]
        return value_terms(values_R, old_R, returns_R, self._objective.value_clip)

    def denominator(self, mini: MiniBatch) -> int:
        """A mean over tokens, whatever the policy's loss is."""
        return mini.num_tokens

    def metrics_of(self, result: UpdateResult) -> dict[str, Metric]:
        """An update of it, as metrics of the policy's."""
        done = 0 if result.skipped else 1
        return {name: m for name, m in result.metrics.items() if name in self.columns.kinds} | {
            "value_loss": Mean(result.loss if done else 0.0, done),
            "value_grad_norm": Mean(result.grad_norm if done else 0.0, done),
            "value_lr": Mean(result.lr, 1),
            "value_skipped_updates": Count(1 - done),
        }


def optimizer_of(policys: OptimizerConfig, objective: PpoConfig) -> OptimizerConfig:
    """The policy's AdamW and guards with the value model's learning rate, constant after its warm-up."""
    return policys.model_copy(
        update={
            "lr": objective.value_lr,
            "min_lr": 0.0,
            "warmup_updates": objective.value_warmup_updates,
            "decay": "constant",
            "decay_updates": None,
        }
    )


def _of_trained_tokens(values_T11: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
    """Of the rows that predict them: [R]."""
    return values_T11[micro.rows_R, 0, 0]
