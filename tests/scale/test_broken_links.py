"""Runs over two hosts that are disturbed between or on them: each ends as the run that nothing disturbed, at
once or when it was resumed, in every bit.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
from support import push_faults, push_holds
from support.host_runs import NUM_STEPS, RunOnHosts, start
from support.hosts import Hosts, reason_against
from support.runs import assert_steps_equal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(reason_against() is not None, reason=reason_against() or ""),
    pytest.mark.timeout(900),
]
ALL = range(1, NUM_STEPS + 1)
# Long enough for TCP to have sent again several times, and a third of what counts as silence. As long again
# after the cut everything has come through: TCP waits twice as long each time.
SHORT_CUT_S = 8
# TCP's own time-out and the silence that the lifeline counts are equally long.
SILENT = ("has given no sign of life for 20 s", "is gone (Connection timed out)")
RESUME = "resume with the same command on every host, with checkpoint.resume=auto"


@pytest.fixture
def hosts(two_hosts) -> Iterator[Hosts]:
    yield two_hosts
    two_hosts[1].mend()


@contextmanager
def begun(hosts: Hosts, place: SimpleNamespace, name: str, engine: int, **extra: str) -> Iterator[RunOnHosts]:
    """A run that has come to its third weight push, in which that engine stands still."""
    folder = place.folder / name
    extra |= with_extension(place, push_holds, f"{engine} 3 {folder}")
    values = {"rollout__extra_args": "[--worker-extension-cls,push_holds.Extension]"}
    with start(place, [hosts[0], hosts[1]], name, ranks=1, extra=extra, **values) as run:
        run.until((folder / "pushing").exists)
        yield run


def with_extension(place: SimpleNamespace, module: ModuleType, setting: str) -> dict[str, str]:
    paths = [str(Path(module.__file__).parent), str(place.data.parent)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {"PYTHONPATH": os.pathsep.join(paths), module.VARIABLE: setting}


def rank_of(run: RunOnHosts, host: int) -> psutil.Process:
    """The process of the rank on that host."""
    return next(p for p in run.named("dapo_test_cores") if p.environ().get("RANK") == str(host))


def assert_ends(run: RunOnHosts, within_s: float, *reasons: str) -> None:
    """All ranks and engines end in time, and the console has one of the reasons and the command."""
    assert run.all_gone(within_s), run.text
    assert run.wait() != 0
    [said] = [line for line in run.text.splitlines() if line.startswith("error: rank 1 on host1 ")]
    assert any(reason in said for reason in reasons) and said.endswith(RESUME), said


def assert_resumes(hosts: Hosts, place: SimpleNamespace, name: str, finished: SimpleNamespace) -> None:
    hosts[1].mend()
    values = {"checkpoint__resume": "auto"}
    with start(place, [hosts[0], hosts[1]], name, ranks=1, log=f"{name}_resumed", **values) as run:
        assert run.wait() == 0, run.text
        assert run.all_gone()
        assert "resuming from" in run.text
    assert_steps_equal(place.folder / name, finished, ALL)


def test_a_slow_link_changes_no_bit(hosts, place, finished):
    """10 Mbit/s in both directions: a push of the tiny model takes about a second."""
    for host in (hosts[0], hosts[1]):
        host.slow(megabits=10)
    try:
        with start(place, [hosts[0], hosts[1]], "slow_link", ranks=1) as run:
            assert run.wait() == 0, run.text
            assert run.all_gone()
    finally:
        for host in (hosts[0], hosts[1]):
            host.fast()
    assert_steps_equal(place.folder / "slow_link", finished, ALL)


def test_a_run_goes_on_over_a_short_cut(hosts, place, finished):
    """TCP sends again what was lost, and nobody takes a third of the silence for the end: the cut changes
    nothing, in a push and in a rollout.
    """
    run_dir = place.folder / "short_cut"
    with begun(hosts, place, "short_cut", engine=1, DAPO_TEST_HOLD=f"{run_dir} 2") as run:
        hosts[1].cut()
        (run_dir / "go_on").touch()  # the answer of the engine on the other side is lost at first
        time.sleep(SHORT_CUT_S)
        hosts[1].mend()
        run.until((run_dir / "held").exists)
        time.sleep(SHORT_CUT_S)
        hosts[1].cut()
        time.sleep(SHORT_CUT_S)
        hosts[1].mend()
        (run_dir / "release").touch()
        assert run.wait() == 0, run.text
        assert run.all_gone()
    assert "failed" not in run.text and "Traceback" not in run.text
    assert_steps_equal(run_dir, finished, ALL)


def test_a_host_that_is_lost_in_a_push_ends_the_run(hosts, place, finished):
    with begun(hosts, place, "lost_in_push", engine=0) as run:
        hosts[1].cut()
        (place.folder / "lost_in_push" / "go_on").touch()
        assert_ends(run, 60, *SILENT)
    assert_resumes(hosts, place, "lost_in_push", finished)


def test_a_host_that_is_lost_in_a_rollout_ends_the_run(hosts, place, finished):
    run_dir = place.folder / "lost_in_rollout"
    hold = {"DAPO_TEST_HOLD": f"{run_dir} 1"}
    with start(place, [hosts[0], hosts[1]], "lost_in_rollout", ranks=1, extra=hold) as run:
        run.until((run_dir / "held").exists)
        hosts[1].cut()
        assert_ends(run, 60, *SILENT)
    assert_resumes(hosts, place, "lost_in_rollout", finished)


def test_a_rank_that_is_killed_in_a_push_ends_the_run(hosts, place, finished):
    with begun(hosts, place, "rank_killed", engine=0) as run:
        rank_of(run, 1).kill()
        (place.folder / "rank_killed" / "go_on").touch()
        assert_ends(run, 60, "has ended without a word: its process was killed")
    assert_resumes(hosts, place, "rank_killed", finished)


def test_an_engine_of_the_other_host_stands_still_in_a_push(hosts, place, finished):
    run_dir, struck = place.folder / "engine_stopped", place.folder / "engine_struck"
    extra = with_extension(place, push_faults, f"1 3 send stop {struck}")
    values = {
        "rollout__extra_args": "[--worker-extension-cls,push_faults.Extension]",
        "rollout__progress_timeout_s": 10,
    }
    with start(place, [hosts[0], hosts[1]], "engine_stopped", ranks=1, extra=extra, **values) as run:
        assert run.wait() == 0, run.text
        assert run.all_gone()
    assert struck.exists() and "engine_1 timed out while it received weights" in run.text, run.text
    assert_steps_equal(run_dir, finished, ALL)


def test_a_run_ends_when_rank_0_is_killed(hosts, place, finished):
    """The other host's rank says so: rank 0's console is gone with it."""
    with begun(hosts, place, "rank_0_killed", engine=1) as run:
        rank_of(run, 0).send_signal(signal.SIGKILL)
        assert run.all_gone(60), run.text
        assert run.wait() != 0
        assert "error: rank 0 on host0 has ended without a word" in run.text
    assert_resumes(hosts, place, "rank_0_killed", finished)
