"""Whole runs whose engines sleep while the policy trains: every step is that of a run whose engines do not,
in every bit.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import runs
from support.runs import assert_steps_equal, metrics, overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 3
EXTENSION = "[--worker-extension-cls,sleep_poison.Extension]"  # asleep, weights become NaN


def started(
    place: SimpleNamespace, run_dir: Path, log: str, env: dict[str, str] | None = None, **values: Any
):
    """A strict run that saves every step."""
    strict = {"sampling__max_age": 0, "run__max_steps": STEPS, "checkpoint__every_steps": 1}
    arguments = overrides(place.model, place.data, run_dir, **(strict | values))
    paths = [str(Path(runs.__file__).parent), str(place.data.parent), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, paths))
    return runs.started(arguments, place.data, place.folder / log, PYTHONPATH=path, **(env or {}))


@pytest.fixture(scope="module")
def awake(place) -> SimpleNamespace:
    """A run whose engines have read the checkpoint and never sleep."""
    run_dir = place.folder / "awake"
    with started(place, run_dir, "awake.log", rollout__load_format="auto") as run:
        assert run.wait() == 0, run.text
    return SimpleNamespace(run_dir=run_dir, metrics=metrics(run_dir))


def test_sleeping_changes_no_bit_also_when_the_run_is_killed_and_resumed(awake, place):
    run_dir = place.folder / "asleep"
    sleep = {"rollout__sleep": True, "rollout__extra_args": EXTENSION}
    with started(place, run_dir, "asleep_1.log", {"DAPO_TEST_HOLD": f"{run_dir} 1"}, **sleep) as run:
        run.until((run_dir / "held").exists)
        run.kill()
    with started(place, run_dir, "asleep_2.log", **sleep) as run:
        assert run.wait() == 0, run.text
        assert run.all_gone()
        assert "resuming from" in run.text and "the engines sleep: rank 0 has" in run.text
    assert_steps_equal(run_dir, awake, range(1, STEPS + 1))
    assert "forgot " in (run_dir / "logs" / "engine_0.log").read_text()
    assert all(line["time/sleep"] > 0 and line["time/wake"] > 0 for line in metrics(run_dir))


def test_a_signal_while_the_engines_come_up_leaves_nothing_behind(place):
    """Then the policy is not built yet, and there is nothing to save."""
    run_dir, scratch = place.folder / "early", place.folder / "scratch"
    scratch.mkdir()
    with started(place, run_dir, "early.log", {"TMPDIR": str(scratch)}, rollout__sleep=True) as run:
        run.until(lambda: run.named("vllm.entrypoints"))
        assert any(path.name.startswith("dapo_engine_") for path in scratch.iterdir())
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(120) == 0, run.text
        assert run.all_gone()
    assert "Traceback" not in run.text and "starting in" not in run.text
    assert not any(path.name.startswith("dapo_engine_") for path in scratch.iterdir())


def test_an_engine_that_is_out_of_memory_when_it_wakes_up_is_restarted_and_changes_no_bit(awake, place):
    run_dir, struck = place.folder / "short_of_memory", place.folder / "struck"
    values = {"rollout__sleep": True, "rollout__extra_args": EXTENSION, "rollout__engines": 2}
    with started(place, run_dir, "short.log", {"DAPO_TEST_WAKE_FAULT": f"1 {struck}"}, **values) as run:
        assert run.wait() == 0, run.text
        assert run.all_gone()
        assert struck.exists()
        assert "engine_1 failed while waking up for weights" in run.text, run.text
        assert "CUDA out of memory" in run.text and "engine_1 is started again" in run.text
    assert_steps_equal(run_dir, awake, range(1, STEPS + 1))
