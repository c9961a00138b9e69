"""The configuration is strict field by field, errors are one line, and what is dumped is what was loaded.

What fields may be together is in test_preflight.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from megatron_dapo.config import ObjectiveSection, RunConfig, register_objective, valid_keys
from megatron_dapo.config.objective import KINDS
from megatron_dapo.errors import UserError

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.yaml"))
MODEL = "model.path=tiny"


def load(*overrides: str) -> RunConfig:
    return RunConfig.load(None, [MODEL, *overrides])


def refuse(message: str, *overrides: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load(*overrides)


def test_the_defaults_are_valid_and_the_papers():
    config = load()
    assert (config.objective.eps_low, config.objective.eps_high) == (0.2, 0.28)
    assert (config.sampling.prompts_per_step, config.sampling.samples_per_prompt) == (512, 16)
    assert config.sampling.prompt_cap == 5120
    assert load("sampling.max_prompts=600").sampling.prompt_cap == 600


# --- reading ----------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_later_over_earlier(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  path: tiny\noptimizer:\n  lr: 1e-3\n  eps: 1e-5\nrun:\n  seed: 1\n")
    config = RunConfig.load(
        path,
        ["optimizer.lr=2e-3", "run.seed=2", "run.seed=3", "optimizer.betas=[0.8,0.9]", "data.epochs=null"],
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
        (
            "objective.eps_lo=1",
            "unknown key objective.eps_lo of objective.kind=dapo; did you mean objective.eps_low?",
        ),
        ("optimizer.rl=1", "unknown key optimizer.rl; did you mean optimizer.lr?"),
        (
            "sampling.prompt_per_step=4",
            "unknown key sampling.prompt_per_step; did you mean sampling.prompts_per_step?",
        ),
        ("rolout.engines=1", "unknown key rolout; did you mean rollout?"),
        ("policy.fp8.recipee=mxfp8", "unknown key policy.fp8.recipee; did you mean policy.fp8.recipe?"),
        ("policy.fb8.recipe=mxfp8", "unknown key policy.fb8; did you mean policy.fp8?"),
        ("policy.fp8=blockwise", "policy.fp8='blockwise': Input should be"),
        ("optimizer.lr=0", "optimizer.lr=0: Input should be greater than 0"),
        ("run.max_steps=many", "run.max_steps='many'"),
        (
            "sampling.samples_per_prompt=1",
            "sampling.samples_per_prompt=1: Input should be greater than or equal to 2",
        ),
        ("objective.mismatch_low=1", "objective.mismatch_low=1: Input should be less than 1"),
        ("objective.mismatch_high=1", "objective.mismatch_high=1: Input should be greater than 1"),
        (
            "objective.mismatch_level=tokens",
            "objective.mismatch_level='tokens': Input should be 'token', 'sequence' or 'geometric'",
        ),
        ("optimizer.max_skipped=0", "optimizer.max_skipped=0: Input should be greater than 0"),
        ("optimizer.spike_factor=1", "optimizer.spike_factor=1: Input should be greater than 1"),
        ("rollout.request_timeout_s=5", "unknown key rollout.request_timeout_s; did you mean rollout."),
        ("rollout.min_engines=0", "rollout.min_engines=0: Input should be greater than 0"),
        ("rollout.progress_timeout_s=0", "rollout.progress_timeout_s=0: Input should be greater than 0"),
        ("model=3", "model=3: Input should be a valid dictionary or instance of ModelConfig"),
        ("run.seed", "override 'run.seed' is not of the form section.key=value"),
        ("--run.seed=1", "override '--run.seed=1' is not of the form section.key=value"),
    ],
)
def test_a_bad_key_or_value_is_named(override, message):
    refuse(message, override)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="model is required"):
        RunConfig.load()
    with pytest.raises(UserError, match="model.path is required"):
        RunConfig.load(None, ["model.dtype=fp32"])
    with pytest.raises(UserError, match="no configuration file at .*none.yaml"):
        RunConfig.load(tmp_path / "none.yaml", [MODEL])


def test_every_wrong_field_is_named_at_once():
    with pytest.raises(UserError, match="(?s)optimizer.rl.*run.max_steps=0"):
        load("optimizer.rl=1", "run.max_steps=0")


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load().run.seed = 1


def test_every_section_and_field_is_listed():
    first = ["model", "layout", "policy", "rollout", "sampling", "reward", "objective", "sync", "optimizer"]
    last = ["batch", "data", "checkpoint", "evaluation", "report", "run"]
    assert list(RunConfig.model_fields) == first + last
    assert {"model.path", "run.verify_sync", "data.few_shot", "policy.fp8", "policy.fp8.recipe"} <= set(
        valid_keys()
    )


def test_a_section_inside_a_section(tmp_path):
    assert load().policy.fp8 is None and load("policy.fp8=null").policy.fp8 is None
    default, changed = load("policy.fp8={}").policy.fp8, load("policy.fp8.recipe=mxfp8").policy.fp8
    assert default is not None and changed is not None
    assert (default.format, default.recipe) == ("e4m3", "blockwise") and (changed.format, changed.recipe) == (
        "e4m3",
        "mxfp8",
    )
    path = tmp_path / "run.yaml"
    path.write_text(load("policy.fp8.recipe=mxfp8").dump())
    assert RunConfig.load(path).policy.fp8 == changed
    assert RunConfig.load(path, ["policy.fp8=null"]).policy.fp8 is None
    path.write_text(load().dump())
    assert RunConfig.load(path, ["policy.fp8.format=hybrid"]).policy.fp8 == default.model_copy(
        update={"format": "hybrid"}
    )


# --- malformed text ---------------------------------------------------------------------

DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.betas=[0.8",
            "cannot read override 'optimizer.betas=[0.8': while parsing a flow sequence",
        ),
        ("model.path={a: 1", "cannot read override 'model.path={a: 1': while parsing a flow mapping"),
        ("run.dir=a\0b", r"cannot read override 'run.dir=a\x00b': unacceptable character"),
        ("run.dir=a\x1bb", "control characters are not allowed"),
        ("run.seed=*other", "found undefined alias"),
        ("run.seed=!!python/name:os.system", "could not determine a constructor"),
        ("run.seed=!!timestamp 99", "cannot read override 'run.seed=!!timestamp 99'"),  # an AttributeError
        ("[=1", "cannot read override '[=1'"),  # an IndexError
        ("run.dir=${oops", "cannot read override 'run.dir=${oops'"),
        ("run.dir=${oops}", "cannot read configuration: Interpolation key 'oops' not found"),
        pytest.param(f"data.few_shot={DEEP}", "is nested too deep", id="deep"),
        pytest.param("run.dir=[" + "a" * 9999, "did not find expected", id="long"),
    ],
)
def test_a_malformed_override_is_an_error_of_one_line(override, message):
    with pytest.raises(UserError) as caught:
        load(override)
    text = str(caught.value)
    assert message in text and "\n" not in text and len(text) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: [1", "while parsing a flow sequence"),
        (b"run: \0", "unacceptable character"),
        (b"run: \xff", "'utf-8' codec can't decode byte 0xff"),
        (b"\tseed: 1", "found character that cannot start any token"),
        (b"run:\n  seed: 1\n  seed: 2\n", "found duplicate key seed"),
        pytest.param(DEEP.encode(), "is nested too deep", id="deep"),
        (b"- a\n- b\n", "holds a list; a configuration is sections of keys"),
        (b"5", "Invalid loaded object type: int"),
    ],
)
def test_a_malformed_file_is_an_error_of_one_line(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        RunConfig.load(path, [MODEL])
    text = str(caught.value)
    assert str(path) in text and message in text and "\n" not in text


# --- kinds of objectives ----------------------------------------------------------------


class ToySection(ObjectiveSection):
    kind: Literal["toy"] = "toy"
    beta: float = Field(default=0.5, gt=0)


@pytest.fixture
def toy() -> Iterator[None]:
    """A second kind of objective, for one test."""
    register_objective(ToySection)
    yield
    del KINDS["toy"]
    RunConfig.model_rebuild(force=True)


def test_the_objective_is_dapo_unless_another_kind_is_named():
    default = load().objective
    assert default.kind == "dapo" and load("objective.kind=dapo").objective == default
    refuse("objective.kind='toy': Input should be 'dapo'", "objective.kind=toy")
    refuse("objective='toy': Input should be a section with a kind, 'dapo'", "objective=toy")


def test_a_registered_kind_brings_its_own_keys(toy, tmp_path):
    config = load("objective.kind=toy", "objective.beta=2", "objective.mismatch_high=3")
    assert config.objective == ToySection(beta=2, mismatch_high=3)
    path = tmp_path / "run.yaml"
    path.write_text(config.dump())
    assert RunConfig.load(path) == config and "beta: 2.0" in config.dump()
    assert load().objective.kind == "dapo"
    refuse("objective.beta=0: Input should be greater than 0", "objective.kind=toy", "objective.beta=0")
    refuse("objective.kind='gppo': Input should be 'dapo' or ", "objective.kind=gppo")


def test_a_key_of_another_kind_is_refused_by_name(toy):
    refuse(
        "unknown key objective.eps_low of objective.kind=toy; did you mean objective.mismatch_low?",
        "objective.eps_low=0.1",
        "objective.kind=toy",
    )
    refuse("unknown key objective.beta of objective.kind=dapo; did you mean objective.", "objective.beta=1")
    refuse(
        "objective.bets of objective.kind=toy; did you mean objective.beta?", "objective={kind: toy, bets: 1}"
    )


def test_the_keys_of_every_kind_are_listed_once(toy):
    keys = valid_keys()
    assert {"objective.eps_low", "objective.beta"} <= set(keys) and len(keys) == len(set(keys))
    assert "objective.eps_low" not in valid_keys("toy") and "objective.beta" not in valid_keys("dapo")


# --- recipes ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reads_back_as_itself(path, tmp_path):
    config = RunConfig.load(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.dump())
    assert RunConfig.load(copy) == config
