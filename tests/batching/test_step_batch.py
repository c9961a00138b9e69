"""Groups to a step's batch: what the packing gets of configuration, model and objective."""

from __future__ import annotations

import pytest
from support.samples import make_group, make_prompt, make_spec

from megatron_dapo.batching.step_batch import make_batch, updates_for
from megatron_dapo.config import RunConfig
from megatron_dapo.objectives import make_objective
from megatron_dapo.types import Batch, Group

SMALL = make_spec()  # a sequence of L tokens costs 16 L + 2 L^2


def group(*lengths: int, version: int = 0) -> Group:
    """One prompt token and responses that make sequences of these lengths."""
    return make_group(make_prompt(tokens=(5,)), lengths=[n - 1 for n in lengths], version=version)


def batch_of(
    groups: list[Group],
    *,
    version: int = 0,
    prompts_per_step: int = 1,
    samples_per_prompt: int = 16,
    updates_per_step: int = 1,
    **layout: int,
) -> Batch:
    """Not checked as a run's configuration is: layouts are planned here that no ranks train."""
    config = RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "layout": layout,
            "sampling": {"prompts_per_step": prompts_per_step, "samples_per_prompt": samples_per_prompt},
            "batch": {"max_tokens": 20, "updates_per_step": updates_per_step},
        }
    )
    return make_batch(groups, config, SMALL, make_objective(config.objective), version)


def test_ranks_are_balanced_by_the_cost_of_the_model():
    batch = batch_of([group(8, 4, 4, 2, 2)], data_parallel=2)
    # 256 | 96 + 96 + 40 + 40; tokens alone would give 8 + 2 | 4 + 4 + 2
    assert batch.mini_batches[0].micro_batches == (((0,),), ((1, 2, 3, 4),))
    assert batch.imbalance == 272 / 264


def test_an_interleaved_pipeline_gets_multiples_of_its_stages():
    interleaved = batch_of([group(3, 3)], pipeline_parallel=4, virtual_pipeline_parallel=2)
    assert len(interleaved.mini_batches[0].micro_batches[0]) == 4
    plain = batch_of([group(3, 3)], pipeline_parallel=4)
    assert len(plain.mini_batches[0].micro_batches[0]) == 1


@pytest.mark.parametrize(
    ("num_groups", "updates"),
    [
        (512, 16),  # a full step of 8,192 samples, 512 to an update
        (256, 8),
        (48, 2),  # 768 samples: 1.5 updates' worth
        (32, 1),
        (3, 1),  # 48 samples: not 16 updates of 3
        (1, 1),
    ],
)
def test_a_smaller_step_makes_fewer_updates_of_as_many_samples(num_groups, updates):
    groups = [group(*[2] * 16)] * num_groups
    batch = batch_of(groups, prompts_per_step=512, updates_per_step=16)
    assert len(batch.mini_batches) == updates
    sizes = [sum(len(micro) for micro in mini.micro_batches[0]) for mini in batch.mini_batches]
    assert sum(sizes) == 16 * num_groups and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("num_samples", "updates"), [(1, 1), (255, 1), (700, 1), (769, 2), (1300, 3), (8192, 16)]
)
def test_updates_are_rounded_to_the_nearest_number_and_never_none(num_samples, updates):
    assert updates_for(num_samples, 512) == updates


def test_carried_groups_alone_are_not_fresh():
    """They are the newest samples of the batch, but an older version than the trained one sampled them."""
    carried = batch_of([group(3, 3, version=6)], version=7)
    assert carried.fresh_N.tolist() == [False, False]
    mixed = batch_of([group(3, 3, version=6), group(3, 3, version=7)], version=7)
    assert mixed.fresh_N.tolist() == [False, False, True, True]


def test_samples_and_denominator_are_the_objectives():
    batch = batch_of([group(8, 4)], version=0)
    assert batch.mini_batches[0].denominator == 7 + 3  # DAPO's: response tokens
    assert batch.advantages_T[:8].tolist() == [batch.advantages_T[0]] * 8 and batch.advantages_T[0] > 0
