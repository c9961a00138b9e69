"""The client against a real vLLM server; log-probabilities against transformers. Faults:
test_client_faults.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest
import torch
from support.models import MAX_MODEL_LEN, TOKEN

from megatron_dapo.rollout.client import (
    EngineClient,
    EngineDied,
    EngineStalled,
    RequestFailed,
    RequestRefused,
)
from megatron_dapo.rollout.wire import PROGRESS_PATH

PROMPT = [10, 20, 30, 40, 50]
EOS = 1
FOREVER = MAX_MODEL_LEN - len(PROMPT)


@pytest.fixture(scope="module")
def reference(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def expected_logprobs(reference, prompt: list[int], response: list[int], temperature: float) -> list[float]:
    tokens = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        scores = torch.log_softmax(reference(tokens).logits[0] / temperature, dim=-1)
    return [float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(response)]


async def idle(engine: EngineClient) -> bool:
    """Whether the server holds no request, as its prefix cache can only be reset then."""
    try:
        await engine.reset_prefix_cache()
    except RequestFailed:
        return False
    return True


async def wait_until_idle(engine: EngineClient, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not await idle(engine):
            await asyncio.sleep(0.02)


async def start_endless(engine: EngineClient, n: int = 4, request_id: str | None = None) -> asyncio.Task:
    """A request that runs until the length limit, and is running now. EOS cannot end it: it would end too
    early too often.
    """
    call = engine.generate(
        PROMPT, n=n, max_tokens=FOREVER, temperature=1e-3, seed=0, weight_version=0, request_id=request_id
    )
    task = asyncio.create_task(call)
    async with asyncio.timeout(20):
        while await idle(engine):
            assert not task.done()
            await asyncio.sleep(0.01)
    return task


@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_logprobs_are_those_of_transformers(engine, reference, temperature):
    completions = await engine.generate(
        PROMPT, n=16, max_tokens=200, temperature=temperature, seed=3, weight_version=5
    )
    assert {completion.finish_reason for completion in completions} == {"stop", "length"} or temperature < 1
    label = await engine.weight_version()
    version = int(label) if label.isdigit() else 5
    for completion in completions:
        tokens = completion.tokens.tolist()
        expected = expected_logprobs(reference, PROMPT, tokens, temperature)
        assert list(completion.logprobs) == pytest.approx(expected, abs=1e-4)
        assert completion.versions == ((version, len(tokens)),)
        # A response that ends by itself ends with the end-of-sequence token, and only that one has it.
        assert (tokens[-1] == EOS) == (completion.finish_reason == "stop")
        assert EOS not in tokens[:-1]
        assert len(tokens) == 200 or completion.finish_reason == "stop"


async def test_other_stop_tokens_end_a_response_too(engine):
    [free] = await engine.generate(PROMPT, n=1, max_tokens=30, temperature=1.0, seed=3, weight_version=0)
    tokens = free.tokens.tolist()
    stop = tokens[4]
    first = tokens.index(stop)
    [stopped] = await engine.generate(
        PROMPT, n=1, max_tokens=30, temperature=1.0, seed=3, weight_version=0, stop_token_ids=[stop, EOS]
    )
    assert stopped.tokens.tolist() == tokens[: first + 1]
    assert stopped.finish_reason == "stop"


async def test_seeds_repeat_samples_and_tell_them_apart(engine):
    async def sample(n: int, seed: int | None) -> list:
        return await engine.generate(PROMPT, n=n, max_tokens=30, temperature=1.0, seed=seed, weight_version=0)

    eight = await sample(8, 100)
    assert [completion.seed for completion in eight] == list(range(100, 108))
    assert [completion.number for completion in eight] == list(range(8))
    assert len({completion.tokens.tobytes() for completion in eight}) == 8
    assert await sample(8, 100) == eight
    # Sample i has seed + i, whichever request it comes from.
    later = [dataclasses.replace(completion, number=i) for i, completion in enumerate(eight[2:5])]
    assert await sample(3, 102) == later
    # Only 32 bits of a seed count on a CPU, which rollout/sample.py allows for.
    high = await sample(1, (1 << 60) + 100)
    assert high[0].tokens.tobytes() == eight[0].tokens.tobytes()
    held_out = await sample(8, (1 << 60) + 2048 + 100)
    assert not {c.tokens.tobytes() for c in held_out} & {
        c.tokens.tobytes() for c in eight if len(c.tokens) > 1
    }
    unseeded = await sample(8, None)
    assert [completion.seed for completion in unseeded] == [None] * 8
    assert {c.tokens.tobytes() for c in unseeded} != {c.tokens.tobytes() for c in eight}
    with pytest.raises(ValueError, match="seed=-1"):
        await sample(1, -1)


async def test_seeded_samples_do_not_depend_on_what_else_runs(engine):
    """Tokens and log-probabilities are equal bit by bit, alone and among others (CPU, fp32)."""
    alone = await engine.generate(PROMPT, n=2, max_tokens=60, temperature=1.0, seed=7, weight_version=0)
    for shift in range(3):
        others = [
            engine.generate(
                [60 + i, *range(3, 6 + 5 * i + shift)],
                n=4,
                max_tokens=20 + 10 * i,
                temperature=1.0,
                weight_version=0,
            )
            for i in range(8)
        ]
        ours = engine.generate(PROMPT, n=2, max_tokens=60, temperature=1.0, seed=7, weight_version=0)
        together, *_ = await asyncio.gather(ours, *others)
        assert together == alone


async def test_more_seeded_prompts_than_one_step_prefills(engine):
    """Partly prefilled seeded prompts end vLLM's CPU engine; ours must not prefill in parts."""

    async def sample(i: int) -> list:
        return await engine.generate(
            [3 + i] * 300, n=2, max_tokens=4, temperature=1.0, seed=10 * i, weight_version=0
        )

    together = await asyncio.gather(*(sample(i) for i in range(60)))
    assert await sample(59) == together[59]


async def test_cancelling_the_call_aborts_the_request(engine):
    task = await start_endless(engine)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    start = time.monotonic()
    await wait_until_idle(engine, 5)
    assert time.monotonic() - start < 2
    assert len(await engine.generate(PROMPT, n=1, max_tokens=3, temperature=1.0, weight_version=0)) == 1


async def test_abort_by_id_ends_all_samples(engine):
    task = await start_endless(engine, request_id="mine")
    await engine.abort(["someone-elses", "mine"])
    with pytest.raises(RequestFailed, match="abort"):
        await asyncio.wait_for(task, 5)
    await wait_until_idle(engine, 5)
    await engine.abort([])


async def test_pause_keeps_or_aborts(engine):
    task = await start_endless(engine, n=1)
    await engine.pause("keep")
    done, _ = await asyncio.wait([task], timeout=0.3)
    assert not done
    await engine.resume()
    await engine.pause("abort")
    with pytest.raises(RequestFailed, match="abort"):
        await asyncio.wait_for(task, 5)
    waiting = asyncio.create_task(
        engine.generate(PROMPT, n=1, max_tokens=3, temperature=1.0, weight_version=0)
    )
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    await engine.resume()
    assert len(await asyncio.wait_for(waiting, 30)) == 1


async def test_errors_quote_the_server(engine, server):
    assert await engine.health()
    with pytest.raises(RequestRefused, match="max_tokens"):
        await engine.generate(PROMPT, n=1, max_tokens=0, temperature=1.0, weight_version=0)
    with pytest.raises(RequestRefused, match=r"answered 400.*1024"):  # longer than max_model_len
        await engine.generate([5] * 2000, n=1, max_tokens=1, temperature=1.0, weight_version=0)
    stranger = EngineClient(server.url, "wrong")
    with pytest.raises(RequestRefused, match="answered 401"):
        await stranger.generate(PROMPT, n=1, max_tokens=1, temperature=1.0, weight_version=0)
    await stranger.close()


async def test_the_servers_counters_show_progress_and_what_runs(engine):
    """The signal of the progress time-out, in the text that this vLLM really sends."""
    await wait_until_idle(engine, 5)
    before = await engine.load()
    assert before.sequences == 0
    task = await start_endless(engine, n=4)
    seen = []
    async with asyncio.timeout(20):
        while len(seen) < 3:
            load = await engine.load()
            if load.sequences == 4 and load.tokens not in (before.tokens, *seen):
                seen.append(load.tokens)
            await asyncio.sleep(0.05)
    assert before.tokens < seen[0] < seen[1] < seen[2]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await engine.wait_idle()


async def test_progress_moves_while_no_response_has_ended(engine):
    """What keeps a long response from being taken for a stalled engine."""
    task = await start_endless(engine, n=64)
    seen = set()
    async with asyncio.timeout(60):
        while len(seen) < 3:
            assert not task.done()
            seen.add((await engine._connection.call("GET", PROGRESS_PATH))["tokens"])
            await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await engine.wait_idle()


async def test_a_server_that_stands_still_is_a_time_out(engine, server):
    """Frozen by vLLM's own pause; the request is aborted, so the server is idle once it goes on."""
    hasty = EngineClient(server.url, TOKEN, progress_timeout_s=1.5)
    await engine.pause("keep")
    try:
        with pytest.raises(EngineStalled, match=r"rollout\.progress_timeout_s=1.5"):
            await hasty.generate(PROMPT, n=2, max_tokens=FOREVER, temperature=1.0, weight_version=0)
    finally:
        await engine.resume()
        await hasty.close()
    await wait_until_idle(engine, 5)


async def test_nobody_there_is_a_dead_engine():
    engine = EngineClient("http://127.0.0.1:9", TOKEN)
    with pytest.raises(EngineDied, match="127.0.0.1:9"):
        await engine.generate(PROMPT, n=1, max_tokens=1, temperature=1.0, weight_version=0)
    with pytest.raises(EngineDied):
        await engine.health()
    await engine.close()
    await engine.close()
