"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`).

It registers our weight receiver and, in the servers of a run, sees to it that no process outlives the run
or spins. Light, and may be called again: it also runs in processes that never see a weight, and in vLLM
processes that have nothing to do with us.
"""

from __future__ import annotations

import ctypes
import inspect
import logging
import multiprocessing
import os
import signal

from megatron_dapo.environment import DIGEST_VARIABLE, ENGINE_VARIABLE, PLUGIN
from megatron_dapo.sync.vllm import outputs

# vLLM's queue readers spin for 1 s after each message, which takes one of two cores from everyone else; after
# that they sleep until notified. Notifications get lost, and vLLM looks for itself only every 5 s: sleeping
# early needs looking often.
BUSY_LOOP_S = 0.0005
RECHECK_MS = 1
PR_SET_PDEATHSIG = 1

log = logging.getLogger("vllm.megatron_dapo")


def register() -> None:
    """Register the weight-transfer backend; in our own servers also die with the parent, spin less, and send
    tokens in bundles.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if PLUGIN not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            PLUGIN, "megatron_dapo.sync.vllm.receiver", "WeightReceiver"
        )
    if ENGINE_VARIABLE not in os.environ:
        return
    die_with_parent()
    spin_less()
    outputs.hold_outputs()
    if os.environ.get(DIGEST_VARIABLE):
        from megatron_dapo.sync.vllm import digest

        digest.register_loader()


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends: EngineCore survives a killed API server otherwise."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # it ended before we asked


def spin_less(busy_loop_s: float = BUSY_LOOP_S, recheck_ms: int = RECHECK_MS) -> None:
    """On CPU, let the readers of vLLM's shared-memory queues sleep soon and look again often."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.distributed.device_communicators import shm_broadcast

    condition = getattr(shm_broadcast, "SpinCondition", None)
    parameters = inspect.signature(condition.__init__).parameters if condition else {"": None}
    known = list(parameters)[-1] == "busy_loop_s" and len(condition.__init__.__defaults__ or ()) == 1
    if not known or not isinstance(getattr(shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS", None), int):
        log.warning("this vLLM's SpinCondition has another shape; its processes spin as they like")
        return
    condition.__init__.__defaults__ = (busy_loop_s,)
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = recheck_ms
