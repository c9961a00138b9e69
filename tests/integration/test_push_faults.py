"""Whole runs of two engines, of which one is struck in a weight push: every step is that of a run that
nothing disturbed, in every bit.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import push_faults
from support.runs import STEPS, assert_steps_equal, overrides, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PUSH = 3  # that of step 2: the first one gives the engines the weights of the start
WORDS = {
    "begin": "when the weight push began",
    "send": "while it received weights",
    "commit": "when the weight push was committed",
}


@pytest.mark.parametrize(
    ("phase", "kind"), [("begin", "kill"), ("send", "kill"), ("commit", "kill"), ("send", "stop")]
)
def test_an_engine_struck_in_a_push_changes_no_bit(finished, place, phase, kind):
    run_dir = place.folder / f"push_{phase}_{kind}"
    struck = place.folder / f"struck_{phase}_{kind}"
    arguments = overrides(
        place.model,
        place.data,
        run_dir,
        rollout__engines=2,
        rollout__extra_args="[--worker-extension-cls,push_faults.Extension]",
        rollout__progress_timeout_s=10,
        run__max_steps=STEPS,
    )
    paths = [str(Path(push_faults.__file__).parent), str(place.data.parent)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    extra = {
        "PYTHONPATH": os.pathsep.join(paths),
        push_faults.VARIABLE: f"1 {PUSH} {phase} {kind} {struck}",
    }
    with started(arguments, place.data, place.folder / f"{run_dir.name}.log", **extra) as run:
        assert run.wait() == 0, run.text
        assert run.all_gone()
        assert struck.exists()
        failed = "timed out" if kind == "stop" else "failed"
        assert f"engine_1 {failed} {WORDS[phase]}" in run.text, run.text
    assert_steps_equal(run_dir, finished, range(1, STEPS + 1))
