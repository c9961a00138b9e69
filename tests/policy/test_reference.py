"""A reference model: which models it may be, and where its weights are on a GPU."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import make_tiny_model

from megatron_dapo.checkpoint import _check_models
from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import read_model
from megatron_dapo.policy import rules
from megatron_dapo.policy.fp8_rules import with_whole_weights
from megatron_dapo.policy.reference import ReferenceModel


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("reference") / "model", layers=1)


def test_a_reference_has_the_policys_tokens(model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    text = (model / "config.json").read_text()
    size = read_model(model).vocab_size
    (other / "config.json").write_text(re.sub(r'("vocab_size": )\d+', rf"\g<1>{size + 8}", text))

    def check(reference: Any) -> None:
        keys = [f"model.path={model}", "model.dtype=fp32", f"objective.reference={reference}"]
        rules.check_model(RunConfig.load(None, keys), read_model(model), on_cpu=True)

    check(model)
    with pytest.raises(
        UserError, match=f"objective.reference={re.escape(str(other))} has a vocabulary of {size + 8}"
    ):
        check(other)


def test_weights_are_on_the_device_only_while_it_computes():
    """The host's copies stand in for the weights before and after; on a CPU there are none."""
    reference: Any = object.__new__(ReferenceModel)
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]), requires_grad=False)
    host = parameter.data.clone()
    reference._parameters, reference._on_host = [parameter], [host]
    seen = []

    def logprobs(batch: Any) -> torch.Tensor:
        seen.append(parameter.data_ptr() != host.data_ptr())
        seen.append(parameter.tolist() == [1.0, 2.0])
        return torch.zeros(1)

    layer: Any = torch.nn.Linear(1, 1)
    layer._fp8_workspaces = {"weight": torch.ones(1)}  # as TransformerEngine's with policy.fp8
    session = SimpleNamespace(device="meta")
    reference._model = SimpleNamespace(session=session, logprobs=logprobs, chunks=[layer])
    host_to = torch.Tensor.to
    try:
        torch.Tensor.to = lambda self, *_, **__: self.clone()  # type: ignore[assignment,method-assign]
        reference.logprobs(None)
    finally:
        torch.Tensor.to = host_to  # type: ignore[method-assign]
    assert seen == [True, True]
    assert layer._fp8_workspaces == {}
    assert parameter.data_ptr() == host.data_ptr()
    reference._on_host = []
    reference.logprobs(None)
    assert parameter.data_ptr() == host.data_ptr()


def test_models_beside_the_policy_quantise_their_weights_as_they_use_them():
    keys = ["model.path=m", "policy.fp8.recipe=blockwise", "policy.fp8.param_gather=true"]
    config = with_whole_weights(RunConfig.load(None, keys))
    assert config.policy.fp8 is not None
    assert (config.policy.fp8.recipe, config.policy.fp8.param_gather) == ("blockwise", False)
    plain = RunConfig.load(None, ["model.path=m"])
    assert with_whole_weights(plain) is plain


# --- what a checkpoint says of them


def policy(value_model: Any = None, digest: str | None = None) -> Any:
    config = RunConfig.load(None, ["model.path=m", "objective.kind=ppo"])
    reference = SimpleNamespace(digest=digest) if digest else None
    return SimpleNamespace(config=config, value_model=value_model, reference=reference)


def test_a_checkpoint_without_the_value_model_is_refused(tmp_path):
    for rest in ({}, {"value_model": None}):
        with pytest.raises(UserError, match="has no value model, which objective.kind=ppo trains"):
            _check_models(tmp_path, policy(value_model=object()), rest)
    _check_models(tmp_path, policy(), {})
    _check_models(tmp_path, policy(value_model=object()), {"value_model": {"num_updates": 1}})


def test_a_checkpoint_of_another_reference_is_refused(tmp_path):
    with pytest.raises(UserError, match="was made with another reference model than what is now in m"):
        _check_models(tmp_path, policy(digest="a"), {"reference": "b"})
    for rest in ({"reference": "a"}, {"reference": None}, {}):  # None: of a run that had no reference yet
        _check_models(tmp_path, policy(digest="a"), rest)
