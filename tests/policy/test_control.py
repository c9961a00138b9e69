"""Ranks wait for rank 0 as long as it takes, and not for one that is gone. The clocks are shortened, the
store is real.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from megatron_dapo.lifeline import Clocks
from megatron_dapo.policy.control import ControlChannel, RankZeroLost

SILENCE_S = 0.6

# Two ranks whose collectives time out after 2 s; the first argument says what rank 0 does before it shares.
RANK = """
import os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from megatron_dapo.policy.control import ControlChannel, RankZeroLost
dist.init_process_group("gloo", timeout=timedelta(seconds=2))
channel = ControlChannel(dist.get_rank(), dist.distributed_c10d._get_default_store(), beat_s=0.2, silence_s=3)
dist.barrier()
if dist.get_rank() == 0 and sys.argv[1] == "slow":
    time.sleep(6)
if dist.get_rank() == 0 and sys.argv[1] == "stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    print("got", channel.share("the batch" if dist.get_rank() == 0 else None), flush=True)
except RankZeroLost as error:
    print("lost:", error, flush=True)
    os._exit(3)
total = torch.ones(1)
dist.all_reduce(total)
print("sum", int(total), flush=True)
"""


def channels(store: dist.Store) -> tuple[ControlChannel, ControlChannel]:
    # type: ignore[return-value]
    return tuple(ControlChannel(rank, store, beat_s=0.1, silence_s=SILENCE_S) for rank in (0, 1))


def test_a_value_that_takes_several_silences_arrives_and_the_order_is_kept():
    leader, follower = channels(dist.HashStore())

    def lead() -> None:
        time.sleep(4 * SILENCE_S)
        leader.share({"step": 1})
        leader.share("second")

    thread = threading.Thread(target=lead)
    thread.start()
    assert follower.share() == {"step": 1}
    assert follower.share() == "second"
    thread.join()
    leader.close()


def test_a_leader_without_signs_of_life_is_given_up_after_the_silence():
    leader, follower = channels(dist.HashStore())
    leader.close()
    began = time.monotonic()
    with pytest.raises(RankZeroLost, match=r"no sign of life for 0\.6 s.*resume from the last checkpoint"):
        follower.share()
    assert SILENCE_S < time.monotonic() - began < 3 * SILENCE_S


def test_where_the_lifeline_watches_a_leader_may_hold_its_interpreter_as_long_as_that_allows():
    leader, follower = channels(dist.HashStore())
    leader.close()
    follower.leave_it_to_the_lifeline(Clocks(beat_s=0.1, silent_beats=2, held_s=1.5))
    began = time.monotonic()
    with pytest.raises(RankZeroLost, match=r"no sign of life for 1\.7 s"):
        follower.share()
    assert 1.7 < time.monotonic() - began < 1.7 + 3 * SILENCE_S


def test_a_store_that_ends_is_a_lost_leader():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    follower = ControlChannel(1, client, beat_s=0.1, silence_s=60)
    timer = threading.Timer(0.5, lambda: None)
    timer.start()
    timer.join()
    del server
    with pytest.raises(RankZeroLost, match="store of this run cannot be reached"):
        follower.share()


def start_rank(rank: int, port: int, behaviour: str) -> subprocess.Popen[str]:
    env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(port), "PYTHONWARNINGS": "ignore"}
    # As under torchrun, the store is neither rank's: it outlives rank 0.
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, "-c", RANK, behaviour]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [("slow", "got the batch\nsum 2\n"), ("stopped", "lost: rank 0 has given no sign of life for 3 s")],
)
def test_real_ranks_outwait_the_time_out_of_their_collectives_but_not_a_stopped_rank_0(behaviour, expected):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [start_rank(rank, store.port, behaviour) for rank in (0, 1)]
    try:
        out, _ = ranks[1].communicate(timeout=90)
        assert out.startswith(expected)
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
            rank.wait()
            if rank.stdout:
                rank.stdout.close()
