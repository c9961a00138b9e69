"""One simulated engine, its client, and a virtual loop to use them in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from megatron_dapo.rollout.simulate_client import SimulatedClient
from megatron_dapo.rollout.simulate_clock import Meter, run_virtual
from megatron_dapo.rollout.simulate_engine import Engine
from megatron_dapo.rollout.simulate_model import Profile

NO_PREFILL = 1e12
PLENTY = 1e9
VERSION = 3  # of the engine's weights


def make_engine(speeds: dict[int, float], *, max_running: int = 64, **options: Any) -> Engine:
    """An engine that is up and decodes at these speeds; by default nothing else takes time."""
    values = {"kv_tokens": PLENTY, "prefill_tokens_per_second": NO_PREFILL, "start_s": 0.0, "sync_s": 0.0}
    profile = Profile(tokens_per_second=speeds, **{**values, "train_tokens_per_second": 1.0, **options})
    engine = Engine(0, profile, max_running=max_running, stalled_after_s=30, meter=Meter())
    engine.is_up, engine.version = True, VERSION
    return engine


def make_client(engine: Engine, length: int, lost: list[tuple[int, int, str]]) -> SimulatedClient:
    """Sample i of every prompt has `length` + i tokens, and the first sample alone is right."""

    def outcome(position: int, version: int, n: int) -> tuple[list[int], list[bool]]:
        return [length + i for i in range(n)], [i == 0 for i in range(n)]

    return SimulatedClient(engine, outcome, lambda *what: lost.append(what), longest=100)


def in_loop(main: Callable[[], Awaitable[Any]]) -> Any:
    return run_virtual(main)[0]
