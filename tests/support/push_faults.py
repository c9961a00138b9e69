"""Loaded into a run's engines by `--worker-extension-cls push_faults.Extension`: strikes one of them in a
weight push.

DAPO_TEST_PUSH_FAULT="ENGINE PUSH PHASE KIND FILE": engine number ENGINE, in its PUSH-th push (1: that of its
start), when PHASE (begin, send, commit) is called. KIND is kill (kill -9 of its server) or stop (its worker
stands still, and the server still answers /health). Once: FILE is made then.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil

from megatron_dapo.environment import ENGINE_VARIABLE
from megatron_dapo.sync.vllm.extension import WorkerExtension
from megatron_dapo.sync.vllm.receiver import WeightReceiver

VARIABLE = "DAPO_TEST_PUSH_FAULT"
METHODS = {"begin": "start_weight_update", "send": "receive_weights", "commit": "finish_weight_update"}


class Extension(WorkerExtension):
    """Adds nothing to the worker: that it is imported there is enough."""


def install(push: int, phase: str, kind: str, file: Path) -> None:
    pushes = 0
    begin, struck = WeightReceiver.start_weight_update, getattr(WeightReceiver, METHODS[phase])

    def counted_begin(self: Any) -> None:
        nonlocal pushes
        pushes += 1
        begin(self)

    def strike(self: Any, *args: Any) -> None:
        if pushes + (phase == "begin") == push and not file.exists():
            file.touch()
            if kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                server = next(
                    p for p in psutil.Process().parents() if "vllm.entrypoints" in " ".join(p.cmdline())
                )
                server.kill()
        if phase == "begin":
            counted_begin(self)
        else:
            struck(self, *args)

    if phase != "begin":
        WeightReceiver.start_weight_update = counted_begin  # type: ignore[method-assign]
    setattr(WeightReceiver, METHODS[phase], strike)


if VARIABLE in os.environ:
    engine, push, phase, kind, file = os.environ[VARIABLE].split(" ", 4)
    if os.environ.get(ENGINE_VARIABLE) == engine:
        install(int(push), phase, kind, Path(file))
