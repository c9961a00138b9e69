"""Saves in the background hold what was there when they began; what fails costs nothing that was saved."""

from __future__ import annotations

import re

import pytest
import torch
from support.jobs_resume import tensors_of
from support.models import make_tiny_model
from support.ranks import run_ranks

from megatron_dapo import checkpoint

KILLS = 20
ERRORS = {
    "ENOSPC": "No space left on device",
    "EDQUOT": "Disk quota exceeded",
    "EROFS": "Read-only file system",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return str(make_tiny_model(folder, tied=True, layers=4, heads=4, kv_heads=2, hidden=64, ffn=64))


@pytest.fixture(scope="module")
def beside(model, tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("beside"))
    job = "support.jobs_background:saves_beside_training"
    return run_ranks(job, 2, model=model, layout="dp2", folder=folder)


def test_training_goes_on_before_anything_is_written(beside):
    for rank in beside:
        assert rank["returned_before"] and rank["still_writing"]


def test_a_checkpoint_holds_what_was_there_when_its_save_began(beside):
    for rank in beside:
        assert rank["loaded"] == [rank["at_save"], rank["later"]]
        assert rank["at_save"] != rank["later"]


def test_one_checkpoint_is_written_at_a_time(beside):
    assert all(rank["first_is_complete"] for rank in beside)


def test_a_file_that_is_cut_short_is_named_on_every_rank(beside):
    words = r"step_000002 is damaged: __1_0\.distcp has 1000 bytes, and should hold \S+ up to byte \d+; take"
    assert all(re.search(words, rank["cut"]) for rank in beside)


@pytest.fixture(scope="module")
def failed(model, tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("failed"))
    job = "support.jobs_background:fails_in_background"
    return run_ranks(job, 2, model=model, layout="pp2", folder=folder, failing_rank=1)


@pytest.mark.parametrize("code", ERRORS)
def test_every_rank_learns_which_rank_failed_and_how(failed, code):
    step = 2 + list(ERRORS).index(code)
    for rank in failed:
        message = rank[code]
        assert f"step_{step:06d} (rank 1: OSError: " in message and ERRORS[code] in message
        assert "previous checkpoint is untouched" in message


def test_a_failed_save_leaves_nothing_and_the_next_one_works(failed):
    assert failed[0]["left"] == ["step_000001", "step_000009"]


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(model, tmp_path):
    job, folder = "support.jobs_background:killed_while_saving", str(tmp_path)
    run_ranks(job, 1, model=model, folder=folder, attempts=KILLS, timeout_s=500)
    cut_off = 0
    for attempt in range(KILLS):
        newest = checkpoint.find(tmp_path / str(attempt) / "run", "auto")
        assert newest is not None
        tensors = tensors_of(newest)  # NaN where a file lacks something
        assert tensors and not any(values.isnan().any() for values in tensors.values())
        state = checkpoint.read_state(newest, 0)
        assert state.rollouts == {"step": state.step} and newest.name == f"step_{state.step:06d}"
        assert torch.load(newest / "run.pt", weights_only=False)["num_updates"] == state.step
        cut_off += any(newest.parent.glob("*.tmp"))
    assert cut_off > KILLS / 4  # the kills did come while something was written
