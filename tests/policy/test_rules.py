"""A policy refuses by itself what it cannot represent, before any process group: tools and tests build
policies without preflight. Each single rule is tested with preflight, which includes them all.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from support.models import make_tiny_model
from support.samples import make_spec

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.objectives import make_objective
from megatron_dapo.policy import layer_choice, rules, step
from megatron_dapo.policy import session as session_file
from megatron_dapo.policy.backend import CPU


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """3 layers, 4 heads, 2 key/value heads."""
    return make_tiny_model(tmp_path_factory.mktemp("rules") / "model", layers=3)


# Megatron takes each of these without a word and trains another model: with two stages one layer of three is
# left out (the gradient norm of a replayed step was 3.70 instead of 4.39), with four tensor ranks two
# key/value heads become four (7.24 instead of 4.75).
SILENT = [
    (
        "layout.pipeline_parallel=2",
        "layout.pipeline_parallel=2 (x virtual 1) does not divide the model's 3 layers; "
        "use one of [1, 3] stages",
    ),
    (
        "layout.tensor_parallel=4",
        "layout.tensor_parallel=4 does not divide the model's 2 key/value heads; use one of [1, 2]",
    ),
]


@pytest.mark.parametrize(("override", "message"), SILENT)
def test_a_policy_refuses_a_layout_that_would_train_another_model(model, override, message, monkeypatch):
    def starts(*_: Any, **__: Any) -> None:
        raise AssertionError("the policy went on")

    monkeypatch.setattr(step.model_file, "build", starts)
    monkeypatch.setattr(session_file, "start", starts)
    config = RunConfig.load(None, [f"model.path={model}", "model.dtype=fp32", override])
    session: Any = SimpleNamespace(backend=CPU)  # no process group is started
    with pytest.raises(UserError, match=re.escape(message)):
        step.Policy(config, session, make_objective(config.objective))


SIZES = {
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden_size": 128,
    "head_dim": 32,
    "ffn_size": 192,
}
DENSE, EXPERTS = make_spec(**SIZES), make_spec(**SIZES, num_experts=4)
SELECTIVE = "policy.recompute=selective"
# overrides, on a CPU, with TransformerEngine, with experts, what is said
ON_DEVICES = [
    (["policy.layers=te"], False, False, False, "policy.layers=te needs TransformerEngine, which is not"),
    (["model.dtype=fp32"], False, True, False, "model.dtype=fp32 does not go with policy.layers=auto on a"),
    (
        ["model.dtype=fp32", "policy.layers=te"],
        False,
        True,
        False,
        "set model.dtype=bf16 or policy.layers=local",
    ),
    (
        ["policy.layers=local", "policy.fp8.recipe=tensorwise"],
        False,
        True,
        False,
        "policy.fp8 on a GPU needs TransformerEngine's layers, and policy.layers=local has none; set",
    ),
    (
        ["policy.layers=local", "policy.recompute_modules=[moe_act]"],
        False,
        True,
        True,
        "policy.recompute_modules=['moe_act']: moe_act needs TransformerEngine's layers",
    ),
    (["policy.recompute_modules=[moe_act]"], False, False, True, "moe_act needs TransformerEngine's layers"),
    (
        [SELECTIVE, "policy.recompute_modules=[core_attn,layernorm]"],
        False,
        True,
        False,
        "policy.recompute_modules=['core_attn', 'layernorm'] would free no memory in this model; name mlp",
    ),
    ([SELECTIVE], False, True, True, "name moe or moe_act or layernorm, or set policy.recompute=null"),
    ([SELECTIVE, "policy.recompute_modules=[core_attn]"], True, False, False, "name mlp or layernorm, or"),
    (["policy.layers=te"], True, True, False, "policy.layers=te needs a GPU and run.device=cpu has none"),
]
ALLOWED = [
    (["model.dtype=fp32"], False, False, False),
    (["model.dtype=fp32", "policy.layers=local"], False, True, False),
    (["model.dtype=fp32"], True, True, False),
    (["policy.layers=local", "policy.fp8.recipe=tensorwise"], True, True, False),
    ([SELECTIVE], False, True, False),
    ([SELECTIVE, "policy.recompute_modules=[layernorm]"], False, True, True),
    ([SELECTIVE, "policy.recompute_modules=[layernorm]", "policy.layers=local"], False, True, False),
    (["policy.recompute_modules=[core_attn]"], False, True, False),  # which says nothing while it is off
    (["policy.recompute_modules=[moe_act]"], False, True, True),
]


@pytest.fixture
def check_on(monkeypatch):
    """check_on(overrides, on a CPU, with TransformerEngine, with experts): the rules on such a machine."""

    def check(overrides: list[str], on_cpu: bool, has_te: bool, experts: bool) -> None:
        monkeypatch.setattr(layer_choice, "has_transformer_engine", lambda: has_te)
        monkeypatch.setattr(rules.torch.cuda, "is_available", lambda: not on_cpu)
        config = RunConfig.load(None, ["model.path=m", *overrides])
        rules.check_model(config, EXPERTS if experts else DENSE, on_cpu=on_cpu)

    return check


@pytest.mark.parametrize(("overrides", "on_cpu", "has_te", "experts", "message"), ON_DEVICES)
def test_what_the_layers_of_a_device_cannot_do_is_refused(
    check_on, overrides, on_cpu, has_te, experts, message
):
    with pytest.raises(UserError, match=re.escape(message)):
        check_on(overrides, on_cpu, has_te, experts)


@pytest.mark.parametrize(("overrides", "on_cpu", "has_te", "experts"), ALLOWED)
def test_what_the_layers_of_a_device_can_do_is_allowed(check_on, overrides, on_cpu, has_te, experts):
    check_on(overrides, on_cpu, has_te, experts)


def test_a_machine_without_a_gpu_says_nothing_about_anothers_software(monkeypatch):
    """Runs are planned on machines that have neither."""
    monkeypatch.setattr(layer_choice, "has_transformer_engine", lambda: False)
    config = RunConfig.load(None, ["model.path=m", "policy.layers=te", "policy.recompute_modules=[moe_act]"])
    rules.check_model(config, EXPERTS, on_cpu=False)
