"""`mp_rank_*` folders by hand, and what is refused. Megatron's own: test_convert_round_trips.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dapo.convert import legacy
from megatron_dapo.convert.tensors import Reader
from megatron_dapo.errors import UserError

FC1, FC2 = torch.arange(48.0).view(8, 6), torch.arange(24.0).view(6, 4)  # gate above up; 4 columns
NORM, EMBEDDING = torch.arange(6.0), torch.arange(60.0).view(10, 6)
L = "decoder.layers.{}.mlp."


def layer(number: int, tp: int, rank: int, offset: float) -> dict[str, torch.Tensor]:
    gate, up = FC1.chunk(2)
    fc1 = torch.cat([half.chunk(tp)[rank] for half in (gate, up)])
    return {
        L.format(number) + "linear_fc1.weight": fc1 + offset,
        L.format(number) + "linear_fc2.weight": FC2.chunk(tp, dim=1)[rank].clone() + offset,
        L.format(number) + "linear_fc2._extra_state": None,
    }


def save(folder: Path, *, tp: int = 2, args: dict[str, Any] | None = None, **changed: Any) -> Path:
    """A pipeline of two stages with two chunks each: layers 0 to 3, whose values are 100 apart."""
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": 2, **(args or {})}
    for pp in range(2):
        for rank in range(tp):
            chunks = [layer(0, tp, rank, 100.0 * (chunk * 2 + pp)) for chunk in range(2)]
            if pp == 0:
                chunks[0]["embedding.word_embeddings.weight"] = EMBEDDING.chunk(tp)[rank].clone()
            else:
                chunks[1]["decoder.final_layernorm.weight"] = NORM
            state = {"args": argparse.Namespace(**sizes), "checkpoint_version": 3.0, "iteration": 5}
            state |= {"model0": chunks[0], "model1": chunks[1]} | changed
            target = folder / f"mp_rank_{rank:02d}_{pp:03d}"
            target.mkdir(parents=True)
            torch.save(state, target / "model_optim_rng.pt")
    return folder


@pytest.mark.parametrize("tp", [1, 2])
def test_chunks_stages_and_parts_make_the_model(tmp_path, tp):
    tensors, layout, rest = legacy.read_folder(save(tmp_path, tp=tp))
    assert (layout.tp, layout.pp, layout.ep, layout.etp, rest["iteration"]) == (tp, 2, 1, tp, 5)
    expected = {"embedding.word_embeddings.weight": EMBEDDING, "decoder.final_layernorm.weight": NORM}
    for i in range(4):
        expected[L.format(i) + "linear_fc1.weight"] = FC1 + 100 * i
        expected[L.format(i) + "linear_fc2.weight"] = FC2 + 100 * i
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(Reader().read(name, tensors[name], 0, len(tensor)), tensor), name


def test_folders_of_expert_parallel_ranks_by_hand():
    sizes = {"tp": 2, "pp": 1, "ep": 2}
    assert legacy.Layout(**sizes, etp=1).ranks() == [(0, 0, 0), (1, 0, 1)]  # the two ranks of a stage
    assert legacy.Layout(**sizes, etp=2).ranks() == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]
    assert legacy.Layout(**sizes, etp=2).folder(1, 0, 1) == "mp_rank_01_001"
    assert legacy.Layout(tp=1, pp=2, ep=2, etp=1).folder(0, 1, 1) == "mp_rank_00_001_001"


def test_a_rank_that_is_missing_or_too_many(tmp_path):
    folder = save(tmp_path)
    (folder / "mp_rank_02_000").mkdir()
    with pytest.raises(UserError, match="saved by tp 2, pp 2, ep 1, but mp_rank_02_000 is there, too"):
        legacy.read_folder(folder)
    (folder / "mp_rank_02_000").rename(folder / "elsewhere")
    (folder / "mp_rank_01_001").rename(folder / "gone")
    with pytest.raises(UserError, match="mp_rank_01_001 is missing; copy all folders"):
        legacy.read_folder(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint_version": 2.0}, r"checkpoint_version 2\.0 orders query, key and value"),
        ({"model1": {"language_model.encoder.layers.0.x": NORM}}, "models before megatron-core"),
        ({"model1": {"decoder.layers.0.mlp.shared.weight": NORM}}, "no model here has it"),
        ({"model0": {L.format(0) + "linear_fc2.weight": FC2.t()}}, "no contiguous vector or matrix"),
    ],
)
def test_what_cannot_be_put_together(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        legacy.read_folder(save(tmp_path, **changed))


def test_a_checkpoint_that_does_not_tell_its_layout(tmp_path):
    torch.save(
        {"checkpoint_version": 3.0, "model": {}}, save(tmp_path) / "mp_rank_00_000" / "model_optim_rng.pt"
    )
    with pytest.raises(
        UserError, match="without the arguments of Megatron's training; its layout is unknown"
    ):
        legacy.read_folder(tmp_path)


def test_ranks_that_do_not_agree(tmp_path):
    folder = save(tmp_path)
    file = folder / "mp_rank_01_000" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["model0"][L.format(0) + "linear_fc2.weight"] = torch.ones(6, 3)
    torch.save(state, file)
    with pytest.raises(
        UserError, match=r"the 2 tensor-parallel ranks do not have \S+linear_fc2\.weight alike"
    ):
        legacy.read_folder(folder)


def test_an_expert_split_that_the_folders_do_not_tell(tmp_path):
    with pytest.raises(UserError, match="expert_tensor_parallel_size=2 beside tensor_model_parallel_size=4"):
        legacy.read_folder(save(tmp_path, tp=4, args={"expert_tensor_parallel_size": 2}))


def test_a_file_that_is_cut_short(tmp_path):
    file = save(tmp_path) / "mp_rank_01_000" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{file} is cut short"):
        legacy.read_folder(tmp_path)
