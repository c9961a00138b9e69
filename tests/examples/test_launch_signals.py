"""The flagship's script at a signal, on one node: ranks save, servers leave, a job is queued again."""

from __future__ import annotations

import signal

import pytest
from support.launching import ASYNC, ONE, ready


@pytest.mark.parametrize("sign", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_and_not_torchrun(launch, tmp_path, sign):
    process = launch(NNODES="1", RANKS_READY=str(tmp_path / "ready"))
    ready(tmp_path / "ready")
    process.send_signal(sign)
    out, error = process.communicate(timeout=20)
    assert process.returncode == 0, error
    assert out.count("saved\n") == 2


@pytest.mark.parametrize(("sign", "queued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_before_the_time_is_up_a_job_saves_and_is_queued_again(launch, tmp_path, sign, queued):
    process = launch(**ONE, RANKS_READY=str(tmp_path / "ready"))
    ready(tmp_path / "ready")
    process.send_signal(sign)
    out, error = process.communicate(timeout=20)
    assert process.returncode == 0, error
    assert out.count("saved\n") == 2
    assert ("scontrol requeue 17\n" in out) == queued


SERVER = """#!/bin/sh
case $1 in */network_interface.py) exit ;; esac
trap "echo left; exit 0" TERM
echo > "$RANKS_READY.0"
echo > "$RANKS_READY.1"
for i in $(seq 30); do sleep 0.05; done
"""


@pytest.mark.parametrize(("on_node", "leaves"), [([], True), (["--on-node"], False)])
def test_a_node_that_serves_leaves_at_a_signal_and_a_job_ends_as_a_whole(launch, tmp_path, on_node, leaves):
    (tmp_path / "python").write_text(SERVER)
    process = launch(*on_node, **ASYNC, NODE_RANK="4", RANKS_READY=str(tmp_path / "ready"))
    ready(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    assert ("left\n" in out) == leaves


def test_a_run_that_fails_is_not_queued_again(start, tmp_path):
    (tmp_path / "srun").write_text(
        "#!/bin/sh\ntrap '' USR1\nsleep 0.5\nkill -USR1 $PPID\nsleep 0.2\nexit 3\n"
    )
    found = start(**ONE, PREFLIGHT="none")
    assert (found.returncode, found.stdout) == (3, "")
