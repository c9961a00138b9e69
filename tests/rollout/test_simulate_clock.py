"""Virtual time: order and distance of timers are real, waiting is not."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from megatron_dapo.rollout.simulate_clock import NothingToWaitFor, run_virtual


def test_a_day_of_sleeping_takes_no_time_and_happens_in_order():
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append((name, asyncio.get_running_loop().time()))

    async def main() -> str:
        await asyncio.gather(sleeper("c", 200_000.0), sleeper("a", 0.25), sleeper("b", 3600.0))
        return "done"

    began = time.monotonic()
    result, seconds = run_virtual(main)
    assert time.monotonic() - began < 1
    assert result == "done" and seconds == pytest.approx(200_000)
    assert [name for name, _ in woken] == ["a", "b", "c"]
    assert [at for _, at in woken] == pytest.approx([0.25, 3600, 200_000])


def test_work_that_is_ready_runs_before_the_clock_moves():
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        times = []
        loop.call_later(1.0, lambda: None)
        for _ in range(100):
            await asyncio.sleep(0)
            times.append(loop.time())
        return times

    assert run_virtual(main)[0] == [0.0] * 100


def test_timeouts_count_virtual_seconds():
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.sleep(31)

    assert run_virtual(main)[1] == pytest.approx(30)


def test_a_hang_is_an_error():
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(NothingToWaitFor):
        run_virtual(main)


def test_functions_for_threads_run_in_place_and_raise_in_place():
    async def main() -> int:
        with pytest.raises(OSError, match="disk"):
            await asyncio.to_thread(fail)
        return await asyncio.to_thread(threading.get_ident)

    def fail() -> None:
        raise OSError("disk")

    assert run_virtual(main) == (threading.get_ident(), 0.0)
