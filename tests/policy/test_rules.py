"""A policy refuses by itself what it cannot represent, before any process group: tools and tests build
policies without preflight. Each single rule is tested with preflight, which includes them all.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from support.models import make_tiny_model

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.objectives import make_objective
from megatron_dapo.policy import session as session_file
from megatron_dapo.policy import step
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
