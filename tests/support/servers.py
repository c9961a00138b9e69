"""Real servers in tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dapo.rollout.server import EngineServer


@contextmanager
def running(server: EngineServer, timeout_s: float = 300) -> Iterator[EngineServer]:
    """From healthy to stopped, whatever happens between."""
    server.start()
    try:
        asyncio.run(server.wait_healthy(timeout_s))
        yield server
    finally:
        server.stop()
