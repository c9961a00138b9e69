"""The configuration is strict: every rule fires with its remedy, and what is dumped is what was loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_dapo.config import RunConfig, valid_keys

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.yaml"))
MODEL = "model.path=tiny"


def load(*overrides: str) -> RunConfig:
    return RunConfig.load(None, [MODEL, *overrides])


def refuse(message: str, *overrides: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(*overrides)


def test_the_defaults_are_valid_and_the_papers():
    config = load()
    assert (config.objective.eps_low, config.objective.eps_high) == (0.2, 0.28)
    assert (config.sampling.prompts_per_step, config.sampling.samples_per_prompt) == (512, 16)
    assert config.sampling.prompt_cap == 5120
    assert load("sampling.max_prompts=600").sampling.prompt_cap == 600


# --- reading ---------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_later_over_earlier(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  path: tiny\noptimizer:\n  lr: 1e-3\n  eps: 1e-5\nrun:\n  seed: 1\n")
    config = RunConfig.load(
        path, ["optimizer.lr=2e-3", "run.seed=2", "run.seed=3", "optimizer.betas=[0.8,0.9]", "data.epochs=null"]
    )
    assert (config.optimizer.lr, config.optimizer.eps, config.run.seed) == (2e-3, 1e-5, 3)
    assert config.optimizer.betas == (0.8, 0.9) and config.data.epochs is None


def test_a_dump_loads_as_the_same_configuration(tmp_path):
    config = RunConfig.make(
        {
            "model": {"path": "tiny"},
            "optimizer": {"lr": 1.2345678901234567e-7, "betas": (0.8, 0.95)},
            "data": {
                "template": 'Solve ${x}, \\${y}: {prompt}\n# "no"',
                "chat": True,
                "few_shot": [{"prompt": "a: b", "response": "yes"}],
            },
            "sampling": {"max_prompts": 600},
            "rollout": {"extra_args": ["--x", "1"]},
            "objective": {"dual_clip": None},
        }
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.dump())
    assert RunConfig.load(path) == config
    assert RunConfig.load(path, ["run.seed=9"]) != config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", "unknown key optimizer.learning_rate; did you mean optimizer."),
        ("optimizer.rl=1", "unknown key optimizer.rl; did you mean optimizer.lr?"),
        ("sampling.prompt_per_step=4", "unknown key sampling.prompt_per_step; did you mean sampling.prompts_per_step?"),
        ("rolout.engines=1", "unknown key rolout; did you mean rollout?"),
        ("policy.fp8.recipee=mxfp8", "unknown key policy.fp8.recipee; did you mean policy.fp8.recipe?"),
        ("policy.fb8.recipe=mxfp8", "unknown key policy.fb8; did you mean policy.fp8?"),
        ("policy.fp8=blockwise", "policy.fp8='blockwise': Input should be"),
        ("optimizer.lr=0", "optimizer.lr=0: Input should be greater than 0"),
        ("run.max_steps=many", "run.max_steps='many'"),
        ("sampling.samples_per_prompt=1", "sampling.samples_per_prompt=1: Input should be greater than or equal to 2"),
        ("objective.mismatch_low=1", "objective.mismatch_low=1: Input should be less than 1"),
        ("objective.mismatch_high=1", "objective.mismatch_high=1: Input should be greater than 1"),
        ("objective.mismatch_level=geometric", "objective.mismatch_level='geometric': Input should be 'token' or 'sequence'"),
        ("optimizer.max_skipped=0", "optimizer.max_skipped=0: Input should be greater than 0"),
        ("optimizer.spike_factor=1", "optimizer.spike_factor=1: Input should be greater than 1"),
        ("run.seed", "override 'run.seed' is not of the form section.key=value"),
        ("--run.seed=1", "override '--run.seed=1' is not of the form section.key=value"),
    ],
)
def test_a_bad_key_or_value_is_named(override, message):
    refuse(message, override)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="model is required"):
        RunConfig.load()
    with pytest.raises(ValueError, match="model.path is required"):
        RunConfig.load(None, ["model.dtype=fp32"])
    with pytest.raises(ValueError, match="no configuration file at .*none.yaml"):
        RunConfig.load(tmp_path / "none.yaml", [MODEL])


def test_every_error_is_told_at_once():
    with pytest.raises(ValueError, match="(?s)optimizer.rl.*run.max_steps=0"):
        load("optimizer.rl=1", "run.max_steps=0")


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load().run.seed = 1


def test_every_section_and_field_is_listed():
    sections = "model layout policy rollout sampling reward objective optimizer batch data checkpoint evaluation report run"
    assert list(RunConfig.model_fields) == sections.split()
    assert {"model.path", "run.verify_sync", "data.few_shot", "policy.fp8", "policy.fp8.recipe"} <= set(valid_keys())


def test_a_section_inside_a_section(tmp_path):
    assert load().policy.fp8 is None and load("policy.fp8=null").policy.fp8 is None
    default, changed = load("policy.fp8={}").policy.fp8, load("policy.fp8.recipe=mxfp8").policy.fp8
    assert default is not None and changed is not None
    assert (default.format, default.recipe) == ("e4m3", "blockwise") and (changed.format, changed.recipe) == ("e4m3", "mxfp8")
    path = tmp_path / "run.yaml"
    path.write_text(load("policy.fp8.recipe=mxfp8").dump())
    assert RunConfig.load(path).policy.fp8 == changed
    assert RunConfig.load(path, ["policy.fp8=null"]).policy.fp8 is None
    path.write_text(load().dump())
    assert RunConfig.load(path, ["policy.fp8.format=hybrid"]).policy.fp8 == default.model_copy(update={"format": "hybrid"})


# --- rules between fields --------------------------------------------------------------------------------------------

SMALL = ("sampling.prompts_per_step=6", "sampling.samples_per_prompt=4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["layout.expert_parallel=4", "layout.data_parallel=2"],
            "layout.expert_parallel=4 x layout.expert_tensor_parallel=1 does not divide the ranks of a pipeline stage",
        ),
        (
            ["layout.virtual_pipeline_parallel=2"],
            "virtual_pipeline_parallel=2 needs at least 2 chunks and layout.pipeline_parallel > 1",
        ),
        (["policy.overlap_param_gather=true"], "needs policy.overlap_grad_reduce=true and optimizer.distributed=true; set both"),
        (
            ["policy.overlap_param_gather=true", "policy.overlap_grad_reduce=true", "optimizer.distributed=false"],
            "needs policy.overlap_grad_reduce=true and optimizer.distributed=true",
        ),
        (["policy.overlap_tensor_parallel=true"], "policy.overlap_tensor_parallel=true needs layout.sequence_parallel=true"),
        (["layout.sequence_parallel=true"], "layout.sequence_parallel=true needs layout.tensor_parallel > 1"),
        (
            [*SMALL, "batch.updates_per_step=5", "layout.data_parallel=2"],
            "= 24 samples do not divide into batch.updates_per_step=5 x layout.data_parallel=2",
        ),
        ([*SMALL, "batch.updates_per_step=4", "layout.data_parallel=4"], "= 24 samples do not divide into"),  # each alone divides
        (["sampling.low=0.7", "sampling.high=0.3"], "sampling.low=0.7 leaves nothing below sampling.high=0.3; lower it"),
        (["sampling.low=0.5", "sampling.high=0.5"], "sampling.low=0.5 leaves nothing below sampling.high=0.5"),
        ([*SMALL, "sampling.max_prompts=5"], "sampling.max_prompts=5 is below sampling.prompts_per_step=6; raise it"),
        (
            ["rollout.max_tokens=99", "reward.overlong_cache=100"],
            "reward.overlong_cache=100 exceeds rollout.max_tokens=99; lower it",
        ),
        (
            ["data.max_prompt_tokens=10", "rollout.max_tokens=20", "batch.max_tokens=29"],
            "batch.max_tokens=29 is below the longest possible sample, data.max_prompt_tokens + rollout.max_tokens = 30; raise",
        ),
        (["data.template=Solve it"], "data.template='Solve it' must hold {prompt}"),
        (["data.few_shot=[{prompt: a, response: b}]"], "data.few_shot needs data.chat=true"),
        (["optimizer.decay=cosine"], "optimizer.decay=cosine needs optimizer.decay_updates"),
        (
            ["optimizer.cpu_offload=0.5", "model.dtype=fp32"],
            "optimizer.cpu_offload=0.5 needs model.dtype=bf16 and optimizer.distributed=true",
        ),
        (
            ["optimizer.cpu_offload=0.5", "optimizer.distributed=false"],
            "optimizer.cpu_offload=0.5 needs model.dtype=bf16 and optimizer.distributed=true",
        ),
        (["objective.mismatch_low=0.5"], "objective.mismatch_low=0.5 is for objective.mismatch_correction=mask, not none"),
        (
            ["objective.mismatch_low=0.5", "objective.mismatch_correction=truncate"],
            "objective.mismatch_low=0.5 is for objective.mismatch_correction=mask, not truncate; set it to null or mask",
        ),
    ],
)
def test_each_rule_between_fields(overrides, message):
    refuse(message, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [*SMALL, "batch.updates_per_step=6", "layout.data_parallel=4"],
        ["sampling.low=0.5", "sampling.high=0.5", "sampling.inclusive=true"],
        [*SMALL, "sampling.max_prompts=6"],
        ["rollout.max_tokens=100", "reward.overlong_cache=100"],
        ["data.max_prompt_tokens=10", "rollout.max_tokens=20", "batch.max_tokens=30"],
        ["data.few_shot=[{prompt: a, response: b}]", "data.chat=true"],
        ["optimizer.decay=cosine", "optimizer.decay_updates=10"],
        ["objective.mismatch_correction=mask", "objective.mismatch_low=0.5", "objective.mismatch_level=sequence"],
        ["layout.tensor_parallel=2", "layout.sequence_parallel=true", "policy.overlap_tensor_parallel=true"],
        ["layout.pipeline_parallel=2", "layout.virtual_pipeline_parallel=2", "layout.context_parallel=2"],
        ["policy.overlap_param_gather=true", "policy.overlap_grad_reduce=true"],
    ],
)
def test_the_edge_of_each_rule_is_allowed(overrides):
    load(*overrides)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path, tmp_path):
    config = RunConfig.load(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.dump())
    assert RunConfig.load(copy) == config
