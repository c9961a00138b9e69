"""Loaded into a run's engines by `--worker-extension-cls push_holds.Extension`: holds one of them in a weight
push, so that a test can do something meanwhile.

DAPO_TEST_PUSH_HOLD="ENGINE PUSH FOLDER": engine number ENGINE, in its PUSH-th push (1: that of its start),
makes FOLDER/pushing when the first chunk comes, and takes it when FOLDER/go_on exists. Once.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from megatron_dapo.environment import ENGINE_VARIABLE
from megatron_dapo.sync.vllm.extension import WorkerExtension
from megatron_dapo.sync.vllm.receiver import WeightReceiver

VARIABLE = "DAPO_TEST_PUSH_HOLD"


class Extension(WorkerExtension):
    """Adds nothing to the worker: that it is imported there is enough."""


def install(push: int, folder: Path) -> None:
    pushes = 0
    begin, receive = WeightReceiver.start_weight_update, WeightReceiver.receive_weights

    def counted_begin(self: Any) -> None:
        nonlocal pushes
        pushes += 1
        begin(self)

    def held(self: Any, *args: Any) -> None:
        if pushes == push and not (folder / "pushing").exists():
            (folder / "pushing").touch()
            while not (folder / "go_on").exists():
                time.sleep(0.02)
        receive(self, *args)

    WeightReceiver.start_weight_update = counted_begin  # type: ignore[method-assign]
    WeightReceiver.receive_weights = held  # type: ignore[method-assign]


if VARIABLE in os.environ:
    engine, number, path = os.environ[VARIABLE].split(" ", 2)
    if os.environ.get(ENGINE_VARIABLE) == engine:
        install(int(number), Path(path))
