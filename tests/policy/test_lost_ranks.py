"""Ranks that wait for one that has stopped, in a collective that may wait for half an hour: all end, and one
says why. The lifeline's clocks are shortened, everything else is real.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

RANK = """
import functools, os, signal, sys, time
import torch, torch.distributed as dist
from megatron_dapo import lifeline
lifeline.Clocks = functools.partial(lifeline.Clocks, beat_s=0.4)
lifeline.LAST_WORDS_S = 0.5
from megatron_dapo.layout import Layout
from megatron_dapo.policy import session
from megatron_dapo.policy.backend import CPU
here = session.start(Layout(dp=int(os.environ["WORLD_SIZE"])), CPU, remedy="resume with this command")
dist.barrier()
lost = int(sys.argv[1])
if here.rank == lost:
    os.kill(os.getpid(), signal.SIGSTOP)
dist.recv(torch.ones(1), lost)
"""


@pytest.mark.parametrize(("stopped", "speaker"), [(2, 0), pytest.param(0, 1, marks=pytest.mark.slow)])
def test_all_end_when_one_is_stopped_and_one_says_why(stopped, speaker):
    """Rank 0 speaks; where it is the one, rank 1 does, and the first rank of every other host."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # it outlives rank 0, as under torchrun
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(stopped)],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        for rank, process in enumerate(ranks):
            if rank == stopped:
                continue
            _, error = process.communicate(timeout=120)
            assert process.returncode == 1
            said = [line for line in error.splitlines() if line.startswith("error: ")]
            assert len(said) == (rank == speaker), error
            if said:
                assert said[0].startswith(f"error: rank {stopped} on ")
                assert "has given no sign of life for 2 s: its process is stopped, or" in said[0]
                assert said[0].endswith("; resume with this command")
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.communicate()
