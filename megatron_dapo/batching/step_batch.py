"""The groups of a step to its Batch: samples of the objective, split into updates and micro-batches of the
run's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_dapo.batching.packing import Cost, pack
from megatron_dapo.types import Batch, Group

if TYPE_CHECKING:
    from megatron_dapo.config import RunConfig
    from megatron_dapo.model_spec import ModelSpec
    from megatron_dapo.objectives.base import Objective


def make_batch(
    groups: Sequence[Group], config: RunConfig, spec: ModelSpec, objective: Objective, version: int
) -> Batch:
    """The whole step's batch, balanced over the ranks by the model's cost; `version` is that of the weights
    trained now.
    """
    samples = objective.samples(groups)
    layout = config.layout.to_layout()
    full_step = config.sampling.prompts_per_step * config.sampling.samples_per_prompt
    return pack(
        samples,
        dp=layout.dp,
        num_updates=updates_for(len(samples), full_step // config.batch.updates_per_step),
        max_tokens=config.batch.max_tokens,
        version=version,
        denominator=objective.denominator,
        cost=cost_of(spec),
        align=layout.sequence_multiple,
        multiple=layout.micro_batch_multiple,
    )


def updates_for(num_samples: int, samples_per_update: int) -> int:
    """How many optimizer updates are made of a step: as many as keep the samples of each near
    `samples_per_update`, and at least one. A step with fewer groups so makes fewer updates, not noisier ones.
    """
    return max(1, round(num_samples / samples_per_update))


def cost_of(spec: ModelSpec) -> Cost:
    """What a sequence costs in this model. Of its experts every token uses `experts_per_token`."""
    return Cost.of_model(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        ffn_size=spec.ffn_size * max(1, spec.experts_per_token),
        vocab_size=spec.vocab_size,
    )
