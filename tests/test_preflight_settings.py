"""Fields that do not go together are refused without a model folder; the edge of each rule is allowed.
Expected words name the fields, the rule and the remedy.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.preflight import check_settings

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.yaml"))
SMALL = ("sampling.prompts_per_step=6", "sampling.samples_per_prompt=4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["layout.expert_parallel=4", "layout.data_parallel=2"],
            "layout.expert_parallel=4 x layout.expert_tensor_parallel=1 does not divide the ranks of a "
            "pipeline stage",
        ),
        (
            ["layout.virtual_pipeline_parallel=2"],
            "virtual_pipeline_parallel=2 needs at least 2 chunks and layout.pipeline_parallel > 1",
        ),
        (
            ["policy.overlap_param_gather=true"],
            "needs policy.overlap_grad_reduce=true and optimizer.distributed=true; set both",
        ),
        (
            [
                "policy.overlap_param_gather=true",
                "policy.overlap_grad_reduce=true",
                "optimizer.distributed=false",
            ],
            "needs policy.overlap_grad_reduce=true and optimizer.distributed=true",
        ),
        (["layout.sequence_parallel=true"], "layout.sequence_parallel=true needs layout.tensor_parallel > 1"),
        (
            [*SMALL, "batch.updates_per_step=5", "layout.data_parallel=2"],
            "= 24 samples do not divide into batch.updates_per_step=5 x layout.data_parallel=2",
        ),
        (
            [*SMALL, "batch.updates_per_step=4", "layout.data_parallel=4"],
            "= 24 samples do not divide into",
        ),  # each alone divides
        (
            ["sampling.samples_per_prompt=17", "rollout.max_concurrency=16", "sampling.prompts_per_step=1"],
            "sampling.samples_per_prompt=17 exceeds rollout.max_concurrency=16",
        ),
        (
            ["evaluation.samples=17", "rollout.max_concurrency=16"],
            "evaluation.samples=17 exceeds rollout.max_concurrency=16",
        ),
        (
            ["rollout.seeded=true", "evaluation.samples=2049", "rollout.max_concurrency=4096"],
            "rollout.seeded=true allows at most 2048 completions of a prompt, not 2049",
        ),
        (
            ["sampling.low=0.7", "sampling.high=0.3"],
            "sampling.low=0.7 leaves nothing below sampling.high=0.3; lower it",
        ),
        (
            ["sampling.low=0.5", "sampling.high=0.5"],
            "sampling.low=0.5 leaves nothing below sampling.high=0.5",
        ),
        (
            ["sampling.low=-0.1", "sampling.high=1.5"],
            "sampling.low=-0.1 and sampling.high=1.5 are accuracies, from 0 to 1; change them, or set",
        ),
        (
            ["sampling.metric=reward_std", "sampling.adaptive=true"],
            "sampling.adaptive=true moves a window of accuracies, not of sampling.metric=reward_std; unset",
        ),
        (
            ["data.path=a.jsonl", "data.sources=[{path: b.jsonl}]"],
            "data.path=a.jsonl and data.sources are both set; make the path a source or unset it",
        ),
        (
            ["data.sources=[{path: x/a.jsonl}, {path: y/a.jsonl}]"],
            "data.sources: 2 sources are named 'a'; give each a name of its own",
        ),
        (
            ["data.sources=[{path: my data.jsonl}]"],
            "data.sources: 'my data' is a part of metric names, so it has letters",
        ),
        (
            ["data.pools=[{up_to: 0.5, weight: 1}, {up_to: 0.5, weight: 0.5}]"],
            "data.pools: up_to=[0.5, 0.5] must grow from pool to pool; put the hardest first",
        ),
        (["reward.overlong_target=0.1"], "reward.overlong_target=0.1 moves the strength of a penalty that"),
        (
            ["reward.overlong_target=0.1", "reward.overlong_cache=9", "reward.overlong_factor=5"],
            "reward.overlong_factor=5.0 begins above reward.overlong_factor_max=4.0; lower it",
        ),
        (
            [*SMALL, "sampling.max_prompts=5"],
            "sampling.max_prompts=5 is below sampling.prompts_per_step=6; raise it",
        ),
        (
            ["rollout.max_tokens=99", "reward.overlong_cache=100"],
            "reward.overlong_cache=100 exceeds rollout.max_tokens=99; lower it",
        ),
        (
            ["data.max_prompt_tokens=10", "rollout.max_tokens=20", "batch.max_tokens=29"],
            "batch.max_tokens=29 is below the longest possible sample, data.max_prompt_tokens + "
            "rollout.max_tokens = 30; raise",
        ),
        (["data.template=Solve it"], "data.template='Solve it' must hold {prompt}"),
        (["data.few_shot=[{prompt: a, response: b}]"], "data.few_shot needs data.chat=true"),
        (
            ["rollout.min_engines=3", "rollout.engines=2"],
            "rollout.min_engines=3 exceeds rollout.engines=2, the engines that are started; lower it",
        ),
        (
            ["run.verify_sync=true", "checkpoint.export_hf=false"],
            "run.verify_sync=true compares with the exported checkpoint; set checkpoint.export_hf=true",
        ),
        (
            ["evaluation.temperature=0", "evaluation.samples=2"],
            "evaluation.temperature=0 is greedy, so evaluation.samples=2 would all be equal; set it to 1",
        ),
        (
            ["policy.fp8.recipe=delayed", "policy.fp8.first_last_bf16=true"],
            "policy.fp8.first_last_bf16=true does not work with policy.fp8.recipe=delayed",
        ),
        (
            ["policy.fp8.param_gather=true", "optimizer.distributed=false"],
            "policy.fp8.param_gather=true needs optimizer.distributed=true",
        ),
        (
            ["policy.fp8.param_gather=true", "model.dtype=fp32"],
            "policy.fp8.param_gather=true needs model.dtype=bf16, not fp32",
        ),
        *(
            (
                [f"policy.fp8.recipe={recipe}", "policy.fp8.param_gather=true", "optimizer.cpu_offload=1.0"],
                f"policy.fp8.param_gather=true with policy.fp8.recipe={recipe} does not work with "
                "optimizer.cpu_offload=1",
            )
            for recipe in ("blockwise", "tensorwise", "mxfp8")
        ),
        (["optimizer.decay=cosine"], "optimizer.decay=cosine needs optimizer.decay_updates"),
        (
            ["optimizer.cpu_offload=0.5", "model.dtype=fp32"],
            "optimizer.cpu_offload=0.5 needs model.dtype=bf16 and optimizer.distributed=true",
        ),
        (
            ["optimizer.cpu_offload=0.5", "optimizer.distributed=false"],
            "optimizer.cpu_offload=0.5 needs model.dtype=bf16 and optimizer.distributed=true",
        ),
        (
            ["objective.mismatch_low=0.5"],
            "objective.mismatch_low=0.5 is for objective.mismatch_correction=mask, not auto",
        ),
        (
            ["objective.mismatch_low=0.5", "objective.mismatch_correction=truncate"],
            "objective.mismatch_low=0.5 is for objective.mismatch_correction=mask, not truncate; set it to "
            "null or mask",
        ),
        (
            ["rollout.sleep=true", "sampling.max_age=2"],
            "rollout.sleep=true with sampling.max_age=2: engines that sleep while the policy trains cannot "
            "sample meanwhile; set sampling.max_age=0 or rollout.sleep=auto",
        ),
        (
            ["sync.delta=true", "rollout.quantization=fp8_block"],
            "sync.delta=true is for engines in bf16, and rollout.quantization=fp8_block sends scales that "
            "change with every element; unset one of them",
        ),
        (
            ["rollout.sleep=true", "sampling.max_age=0", "rollout.colocated=false"],
            "rollout.sleep=true with rollout.colocated=false: the policy has no use for the memory of other "
            "hosts; set rollout.sleep=auto",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_settings(RunConfig.load(None, ["model.path=no/such/folder", *overrides]))


@pytest.mark.parametrize(
    "overrides",
    [
        [*SMALL, "batch.updates_per_step=6", "layout.data_parallel=4"],
        ["sampling.low=0.5", "sampling.high=0.5", "sampling.inclusive=true"],
        ["sampling.metric=reward_std"],
        ["sampling.metric=reward_mean", "sampling.low=-0.5", "sampling.high=2"],
        ["data.sources=[{path: a.jsonl}, {path: b.jsonl, weight: 0.5}]"],
        ["data.pools=[{up_to: 0, weight: 0.5}, {up_to: 1, weight: 0.5}]"],
        ["reward.overlong_target=0.1", "reward.overlong_cache=9"],
        [*SMALL, "sampling.max_prompts=6"],
        ["rollout.max_tokens=100", "reward.overlong_cache=100"],
        ["data.max_prompt_tokens=10", "rollout.max_tokens=20", "batch.max_tokens=30"],
        ["data.few_shot=[{prompt: a, response: b}]", "data.chat=true"],
        ["optimizer.decay=cosine", "optimizer.decay_updates=10"],
        [
            "objective.mismatch_correction=mask",
            "objective.mismatch_low=0.5",
            "objective.mismatch_level=sequence",
        ],
        ["layout.tensor_parallel=2", "layout.sequence_parallel=true"],
        ["layout.pipeline_parallel=2", "layout.virtual_pipeline_parallel=2", "layout.context_parallel=2"],
        ["policy.overlap_param_gather=true", "policy.overlap_grad_reduce=true"],
        ["rollout.min_engines=2", "rollout.engines=2"],
        ["rollout.min_engines=24", "rollout.engines=2", "rollout.colocated=false"],
        ["run.verify_sync=true"],
        ["rollout.sleep=true", "sampling.max_age=0"],
        ["rollout.sleep=auto", "sampling.max_age=2"],
        ["sync.delta=true", "model.dtype=bf16"],
        ["evaluation.temperature=0", "evaluation.samples=1"],
        ["policy.fp8.recipe=delayed", "policy.fp8.param_gather=true", "optimizer.cpu_offload=1.0"],
    ],
)
def test_the_edge_of_each_rule_is_allowed(overrides):
    check_settings(RunConfig.load(None, ["model.path=no/such/folder", *overrides]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_fields_of_every_recipe_go_together(path):
    check_settings(RunConfig.load(path))


def test_engines_are_counted_over_all_hosts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    words = ["model.path=m", "rollout.engines=2"]
    check_settings(RunConfig.load(None, [*words, "rollout.min_engines=4"]))
    with pytest.raises(UserError, match=r"min_engines=5 exceeds rollout\.engines=2 on each of 2 hosts, the"):
        check_settings(RunConfig.load(None, [*words, "rollout.min_engines=5"]))
