"""A whole run with a curriculum, an adaptive window and an adaptive length penalty that is killed and resumed
is the run that was not. The same for many more moments is in rollout/test_resumed_adaptive.py, on simulated
engines.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.runs import STEPS, Run, assert_steps_equal, metrics, resume

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ADAPTIVE = {
    "sampling__low": 0.3,
    "sampling__high": 0.7,
    "sampling__adaptive": True,
    "sampling__max_prompts": 64,
    "sampling__on_cap": "train_smaller_batch",
    "reward__overlong_cache": 4,
    "reward__overlong_target": 0.5,
    "reward__overlong_gain": 0.5,
    "data__skip_solved": 1,
    "data__solved": 0.5,
    "data__pools": "[{up_to: 0.25, weight: 0.5}]",
    "checkpoint__export_hf": False,
}


def test_a_killed_run_with_all_that_adapts_resumes_exactly(place):
    whole, killed = place.folder / "adaptive", place.folder / "adaptive_killed"
    with resume(place, whole, "adaptive.log", **ADAPTIVE) as run:
        finish(run)
    with resume(place, killed, "adaptive_killed_1.log", hold=f"{killed} 2", **ADAPTIVE) as run:
        run.until((killed / "held").exists)
        run.kill()
    with resume(place, killed, "adaptive_killed_2.log", **ADAPTIVE) as run:
        finish(run)
    lines = metrics(whole)
    assert len({line["reward/overlong_factor"] for line in lines}) > 2, "the penalty did not move"
    assert_steps_equal(killed, SimpleNamespace(metrics=lines, run_dir=whole), range(1, STEPS + 1))


def finish(run: Run) -> None:
    assert run.wait() == 0, run.text
