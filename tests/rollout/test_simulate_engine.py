"""The simulated engine against schedules made by hand. `at` is the virtual second at which a request ends."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from support.simulated_engines import in_loop, make_client, make_engine

from megatron_dapo.rollout.client import EngineDied, EngineStalled
from megatron_dapo.rollout.simulate_clock import run_virtual
from megatron_dapo.rollout.simulate_engine import Engine
from megatron_dapo.rollout.simulate_model import Fault


def ends(engine: Engine, *lengths: int, prompt_tokens: int = 1, after: float = 0.0) -> list[float]:
    """Seconds at which responses of these lengths end, one request each, the last sent `after` seconds."""

    async def one(length: int, wait_s: float) -> float:
        await asyncio.sleep(wait_s)
        await engine.submit(prompt_tokens, [length]).done
        return asyncio.get_running_loop().time()

    async def main() -> list[float]:
        waits = [0.0] * (len(lengths) - 1) + [after]
        return await asyncio.gather(*(one(*pair) for pair in zip(lengths, waits, strict=True)))

    return run_virtual(main)[0]


def test_running_sequences_share_the_engine():
    # three at 3 tokens/s each until the first ends, then two at 5, then one at 10
    engine = make_engine({1: 10, 2: 10, 3: 9})
    first = 10 / 3
    assert ends(engine, 10, 20, 30) == pytest.approx([first, first + 10 / 5, first + 10 / 5 + 10 / 10])
    assert engine.tokens == pytest.approx(60)


def test_one_that_comes_later_slows_those_that_run():
    # alone for 1 s (10 tokens of 20), then two at 4 tokens/s: 10 more take 2.5 s; the other has 10 left,
    # alone
    engine = make_engine({1: 10, 2: 8})
    assert ends(engine, 20, 20, after=1.0) == pytest.approx([3.5, 4.5])


def test_more_than_run_at_once_wait_their_turn():
    assert ends(make_engine({1: 10}, max_running=1), 10, 10, 10) == pytest.approx([1, 2, 3])


def test_a_full_cache_sends_the_youngest_back_and_reads_it_again():
    # Prompts of 5 tokens: 10 are read in 2/3 s. Both make 10 tokens in 1 s, then the cache of 30 is full.
    # The second goes back with 10 tokens; the first ends after 1 s more. Then 15 tokens are read in 1 s,
    # and the last 10 are made in 1 s.
    engine = make_engine({1: 10, 2: 20}, kv_tokens=30, prefill_tokens_per_second=15)
    assert ends(engine, 20, 20, prompt_tokens=5) == pytest.approx([2 / 3 + 2, 2 / 3 + 4])
    assert engine.preemptions == 1
    assert engine.tokens == pytest.approx(40)


def test_a_prompt_is_read_once_for_all_its_samples():
    # 8 prompt tokens at 4 tokens/s, then two samples of 10 at 5 tokens/s each
    engine = make_engine({1: 10}, prefill_tokens_per_second=4)

    async def main() -> float:
        await engine.submit(8, [10, 10]).done
        return asyncio.get_running_loop().time()

    assert in_loop(main) == pytest.approx(2 + 2)


def test_seconds_are_counted_by_phase_and_state():
    engine = make_engine({1: 10})

    async def main() -> None:
        engine.set_phase("rollout")
        await asyncio.sleep(1)  # idle
        await engine.submit(1, [20]).done  # busy for 2 s
        engine.set_phase("trainer")
        await asyncio.sleep(4)
        engine.hold(asleep=True)
        await asyncio.sleep(16)
        engine.hold(asleep=False)
        engine.stop()
        await asyncio.sleep(8)
        engine.set_phase("end")

    in_loop(main)
    seconds = {key: s for key, s in engine.time_in.items() if s}
    assert seconds == {
        ("rollout", "idle"): pytest.approx(1),
        ("rollout", "busy"): pytest.approx(2),
        ("trainer", "idle"): pytest.approx(4),
        ("trainer", "asleep"): pytest.approx(16),
        ("trainer", "down"): pytest.approx(8),
    }


# --- the client, and faults


def test_completions_have_the_drawn_lengths_and_their_tokens_are_the_verdict():
    async def main() -> list[Any]:
        client = make_client(make_engine({1: 10}), 4, [])
        return await client.generate(
            range(7, 9), n=2, max_tokens=5, weight_version=2, seed=None
        )  # the engine says 3

    first, second = in_loop(main)
    assert first.tokens.tolist() == [1] * 4 and second.tokens.tolist() == [0] * 5
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert second.versions == ((3, 5),) and second.number == 1
    assert first.tokens.base is not None  # a view: no memory of its own


def test_a_cancelled_request_loses_what_it_had_made_and_makes_room():
    lost: list[tuple[int, int, str]] = []

    async def main() -> float:
        engine = make_engine({1: 10, 2: 10})
        client = make_client(engine, 60, lost)
        call = asyncio.ensure_future(client.generate([7], n=1, max_tokens=99, weight_version=0))
        other = engine.submit(1, [20])
        await asyncio.sleep(2)  # 10 tokens each
        call.cancel()
        await other.done
        assert engine.sequences() == 0
        return asyncio.get_running_loop().time()

    assert in_loop(main) == pytest.approx(2 + 1)
    assert lost == [(7, 10, "aborted")]


@pytest.mark.parametrize(
    ("kind", "error", "at", "tokens"),
    [("death", EngineDied, 3.0, 30), ("stall", EngineStalled, 3.0 + 30, 30)],
)
def test_a_fault_fails_the_requests_in_flight(kind, error, at, tokens):
    lost: list[tuple[int, int, str]] = []

    async def main() -> None:
        engine = make_engine({1: 10})
        client = make_client(engine, 90, lost)
        loop = asyncio.get_running_loop()
        loop.call_later(3, engine.strike, Fault(engine=0, kind=kind, at_s=3))
        with pytest.raises(error):
            await client.generate([0], n=1, max_tokens=99, weight_version=0)
        assert loop.time() == pytest.approx(at)

    in_loop(main)
    assert lost == [(0, tokens, "failed")]


def test_a_slow_engine_takes_its_factor_longer():
    async def main() -> float:
        engine = make_engine({1: 10})
        loop = asyncio.get_running_loop()
        loop.call_later(1, engine.strike, Fault(engine=0, kind="slow", at_s=1, factor=10))
        await engine.submit(1, [20]).done
        return loop.time()

    assert in_loop(main) == pytest.approx(1 + 10)


def test_the_load_is_what_was_asked_for_and_has_not_ended():
    async def main() -> None:
        client = make_client(
            make_engine({1: 10}), 4, []
        )  # 5 samples of 4 to 8 tokens end at 2.0, 2.4, 2.7, ...
        calls = [asyncio.ensure_future(client.generate([0], n=5, max_tokens=99, weight_version=0))]
        await asyncio.sleep(2.5)
        assert client.sequences_on_server() == 3
        calls.append(asyncio.ensure_future(client.generate([1], n=3, max_tokens=99, weight_version=0)))
        await asyncio.sleep(0.1)
        assert client.sequences_on_server() == 3 + 3
        calls[0].cancel()
        await asyncio.sleep(0.1)
        assert client.sequences_on_server() == 3
        await calls[1]
        assert client.sequences_on_server() == 0

    in_loop(main)


def test_the_caches_counter_is_the_sum_over_the_running_sequences():
    generator = random.Random(5)
    engine = make_engine({1: 10, 8: 40}, kv_tokens=90, prefill_tokens_per_second=500, max_running=6)

    async def main() -> None:
        calls = []
        for _ in range(60):
            calls.append(engine.submit(3, [generator.randint(1, 30), generator.randint(1, 30)]))
            await asyncio.sleep(generator.random() * 2)
            engine.set_phase("rollout")  # counters are brought to now
            contexts = [3 + engine._made(sequence) for sequence in engine._running]
            assert engine._used() == pytest.approx(sum(contexts), abs=1e-6)
            assert sum(contexts) <= 90 + 1e-6
        await asyncio.gather(*(call.done for call in calls))

    in_loop(main)
    assert engine.preemptions > 5
