"""One session of process groups per process, and several models in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import reference
from support.cases import LAYOUTS, PolicyRun
from support.models import make_tiny_model
from support.ranks import run_ranks
from support.samples import make_samples

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.layout import Coordinates
from megatron_dapo.objectives import make_objective
from megatron_dapo.policy.backend import CPU
from megatron_dapo.policy.runner import frozen_model
from megatron_dapo.policy.step import Policy

SHAPE: dict[str, Any] = dict(layers=2, heads=4, kv_heads=2, hidden=64, ffn=64)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sessions"))
    return run_ranks("support.jobs_sessions:describe_session", 4, layout="tp2_dp2", folder=folder)


def test_every_rank_stands_where_the_layout_says(sessions):
    layout = LAYOUTS["tp2_dp2"]
    for rank, found in enumerate(sessions):
        tp, cp, dp, pp = found["coordinates"]
        assert Coordinates(tp=tp, cp=cp, dp=dp, pp=pp) == layout.coordinates(rank)


def test_a_replica_is_the_ranks_that_train_on_the_same_samples(sessions):
    assert [found["replica"] for found in sessions] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [found["leader"] for found in sessions] == [0, 0, 2, 2]


def test_a_second_start_is_the_same_session_and_another_layout_or_backend_is_refused(sessions):
    for found in sessions:
        assert found["same"]
        layout, backend = found["refusals"]
        assert "already runs tp2 x pp1 x dp2 on the cpu, asked for tp4 x pp1 x dp1 on the cpu" in layout
        assert "asked for tp2 x pp1 x dp2 on the gpu; models of a process share one layout" in backend


def test_what_rank_0_decides_reaches_every_rank(sessions):
    assert [found["shared"] for found in sessions] == ["decided"] * 4


# --- two models in one process ----------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints of the policy and of the reference: the same sizes, other weights."""
    folder = tmp_path_factory.mktemp("models")
    return [make_tiny_model(folder / str(seed), tied=True, seed=seed, **SHAPE) for seed in (0, 1)]


@pytest.fixture(scope="module")
def together(models, tmp_path_factory):
    policy, frozen = map(str, models)
    run = PolicyRun(name="policy", model=policy, layout="tp2", overrides=["optimizer.lr=1e-2"])
    folder = str(tmp_path_factory.mktemp("together"))
    return run_ranks(
        "support.jobs_sessions:train_beside_a_reference", 2, run=run, reference=frozen, folder=folder
    )


def of_transformers(folder: Any) -> torch.Tensor:
    model = reference.load(folder, torch.float32)
    with torch.no_grad():
        parts = [
            torch.cat([torch.zeros(1), reference.logprobs(model, sample)]) * sample.response_mask
            for sample in make_samples()
        ]
    return torch.cat(parts)


def test_each_model_has_the_log_probabilities_of_its_own_checkpoint(models, together):
    policy, frozen = map(of_transformers, models)
    assert float((policy - frozen).abs().max()) > 1  # they do differ
    for rank in together:
        torch.testing.assert_close(torch.tensor(rank["before"]["policy"]), policy, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.tensor(rank["before"]["reference"]), frozen, rtol=0, atol=1e-4)


def test_an_update_moves_the_policy_alone(together):
    for rank in together:
        assert rank["policy_moved"] and rank["after"]["policy"] != rank["before"]["policy"]
        assert rank["reference_kept"] and rank["after"]["reference"] == rank["before"]["reference"]
        assert not rank["reference_trains"]


# --- refused before anything is built ---------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "override", "message"),
    [
        ({"layers": 3}, "layout.pipeline_parallel=2", "does not divide the model's 3 layers"),
        ({}, "layout.tensor_parallel=4", "does not divide the model's 2 key/value heads"),
    ],
)
def test_a_layout_that_would_train_another_model_is_refused(tmp_path, shape, override, message):
    """Megatron builds both without an error, and trains on gradients that are wrong by a third."""
    model = make_tiny_model(tmp_path / "model", **(SHAPE | shape))
    config = RunConfig.load(None, [f"model.path={model}", "model.dtype=fp32", override])
    session: Any = SimpleNamespace(backend=CPU)
    with pytest.raises(UserError, match=message):
        Policy(config, session, make_objective(config.objective))
    with pytest.raises(UserError, match=message):
        frozen_model(config, session, str(model))
