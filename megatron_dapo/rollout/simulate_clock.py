"""Virtual time: an event loop whose clock jumps to the next timer when nothing is ready to run.

    result, seconds = run_virtual(simulate)     # hours of sleeping take milliseconds

Everything that only waits (asyncio.sleep, call_later, timeouts) behaves as on a real loop and takes no time.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


class NothingToWaitFor(RuntimeError):
    """Every task of the loop waits for another one and no timer is set: on a real loop this would hang."""


class Meter:
    """CPU seconds of the simulated part of the program, to be taken off what the controller used."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time() - self._began


class _Selector(selectors.DefaultSelector):
    """Where an event loop would sleep until its next timer, this moves the loop's clock instead."""

    seconds = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise NothingToWaitFor("every task waits and no timer is set")
        if not ready and timeout:
            self.seconds += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that starts at second 0 and never waits.

    Functions given to threads (asyncio.to_thread) run at once, in the loop's own thread: a thread would need
    real time.
    """

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.seconds

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def run_virtual(main: Callable[[], Awaitable[T]]) -> tuple[T, float]:
    """Run `main()` on a new virtual loop; its result and the virtual seconds that it took."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:

        async def timed() -> tuple[T, float]:
            result = await main()
            return result, asyncio.get_running_loop().time()

        return runner.run(timed())
