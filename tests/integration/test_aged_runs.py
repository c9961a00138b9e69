"""A run whose sampling goes on while the policy trains and over weight pushes, killed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.runs import groups, metrics, overrides, started

from megatron_dapo import checkpoint
from megatron_dapo.types import Group, Partial

pytestmark = pytest.mark.timeout(1800)  # a busy machine needs minutes for a server's start alone


def trained_groups(run_dir: Path) -> dict[int, Group]:
    """Every group that the run trained on, by its position."""
    files = sorted((run_dir / "rollouts").glob("step_*.parquet"))
    return {group.prompt.position: group for file in files for group in groups(file)}


def running(run_dir: Path) -> list[Partial]:
    """The beginnings of unfinished responses in the newest checkpoint."""
    newest = checkpoint.find(run_dir, "auto") if (run_dir / "checkpoints").exists() else None
    slots = torch.load(newest / "carried.pt", weights_only=False)["slots"] if newest else []
    began = [partial for slot in slots for partial in slot.began]
    return [partial for partial in began if partial.finish_reason is None and len(partial.tokens)]


def test_a_killed_run_goes_on_with_the_responses_that_it_had_begun(place):
    """kill -9 of everything when a checkpoint holds unfinished responses. They are trained on with the tokens
    that were made before the kill, and the rest comes from the weights after it.
    """
    run_dir = place.folder / "aged"
    values = {
        "rollout__seeded": False,
        "rollout__max_tokens": 400,
        "rollout__max_concurrency": 4,  # one group: sampling takes longer than the rest of a step
        "sampling__prompts_per_step": 4,
        "sampling__max_age": 1,
        "sampling__dynamic": False,  # every group is trained on
        "batch__max_tokens": 2048,
        "optimizer__lr": 0.0003,
        "checkpoint__every_steps": 1,
    }
    arguments = overrides(place.model, place.data, run_dir, **values, run__max_steps=30)
    with started(arguments, place.data, place.folder / "aged_1.log") as run:
        run.until(lambda: len(metrics(run_dir)) > 1 and running(run_dir))
        run.kill()
    assert running(run_dir)
    newest = checkpoint.find(run_dir, "auto")
    assert newest is not None
    begun = [slot for slot in torch.load(newest / "carried.pt", weights_only=False)["slots"] if slot.began]

    steps = int(newest.name.removeprefix("step_")) + 2  # what was begun is trained on by then
    arguments = overrides(place.model, place.data, run_dir, **values, run__max_steps=steps)
    with started(arguments, place.data, place.folder / "aged_2.log") as run:
        assert run.wait() == 0, run.text
        assert f"resuming from {newest}" in run.text and "Traceback" not in run.text
    trained = trained_groups(run_dir)
    went_on = 0
    for slot in begun:
        completions = trained[slot.prompt.position].completions
        for partial, completion in zip(slot.began, completions, strict=True):
            known = len(partial.tokens)
            assert completion.tokens[:known].tolist() == partial.tokens.tolist()
            assert completion.logprobs[:known].tolist() == partial.logprobs.tolist()
            went_on += known > 0 and len(completion.tokens) > known
    assert went_on

    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines[0]["policy/fresh_tokens"] == 1 and min(line["policy/fresh_tokens"] for line in lines) < 1
    gaps = [line["policy/rollout_logprob_gap"] for line in lines if line["policy/fresh_tokens"] > 0]
    assert len(gaps) > 1 and 0 < max(gaps) < 1e-4  # also of fresh tokens behind a push that nobody waited for
    runs = {len(c.versions) for group in trained.values() for c in group.completions}
    assert max(runs) > 1, "no response went on over a push"
