"""What is made of the policy's state where layers are TransformerEngine's (its stand-in here): export, push,
offload, checkpoints, and checkpoints of the other kind of layers.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.cases import PolicyRun
from support.models import make_tiny_model
from support.standin import run_ranks

OPTIMIZER = ("optimizer.lr=1e-3", "optimizer.eps=1e-5")
RELATIVE, WEIGHTS = 1e-5, 2e-5  # as of every layout (support/invariance.py)
LAYOUTS = ("tp2_sp", "dp2")
WHO = ("te", "again", "local", "back")  # saved; loaded by the same layers, local ones, and those of the first


def kept_and_moved(folder, layouts, **model):
    path = make_tiny_model(folder / "model", layers=4, heads=4, kv_heads=2, hidden=64, ffn=64, **model)
    runs = [
        PolicyRun(name=layout, model=str(path), layout=layout, overrides=OPTIMIZER, num_updates=2)
        for layout in layouts
    ]
    return run_ranks("support.jobs_gpu_path:keep_and_move", 2, runs=runs, folder=str(folder), timeout_s=550)


def check(folder, name, by_rank) -> None:
    for found in (report[name] for report in by_rank if name in report):
        assert found["layers"] == "megatron.core.extensions.transformer_engine"
        assert found["local_layers"] == "megatron.core.tensor_parallel.layers"
        assert found["not_held"] == []
        assert len(set(found["digests"])) == 1, "updated, away, loaded over zeros"
        assert len(set(found["digests_after"])) == 1, "the next update, and that of who loaded the checkpoint"
        assert found["digests"][0] != found["digests_after"][0]  # the digest does see an update
        updated, *loaded = found["weights"]
        assert updated and all(weights == updated for weights in loaded)
        undisturbed, again, *others = found["next"]
        assert again == undisturbed
        for moved in others:
            assert moved == pytest.approx(undisturbed, rel=RELATIVE)
    check_files(folder, name)


def check_files(folder, name) -> None:
    source, exported = (weights_in(path) for path in (folder / "model", folder / f"{name}-te" / "export"))
    assert source and exported.keys() == source.keys()
    assert all(exported[key].equal(tensor) for key, tensor in source.items())
    undisturbed, *others = (weights_in(folder / f"{name}-{who}" / "after") for who in WHO)
    for other in others:
        assert undisturbed and other.keys() == undisturbed.keys()
        gaps = [float((other[key] - tensor).abs().max()) for key, tensor in undisturbed.items()]
        assert max(gaps) < WEIGHTS


def weights_in(folder) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    return folder, kept_and_moved(folder, LAYOUTS, tied=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_under_transformer_engines_layers(dense, name):
    check(dense[0], name, dense[1])


@pytest.mark.slow
def test_state_under_transformer_engines_experts(tmp_path):
    layouts = ("tp2_sp", "ep2")
    by_rank = kept_and_moved(tmp_path, layouts, arch="qwen3_moe")
    for name in layouts:
        check(tmp_path, name, by_rank)
