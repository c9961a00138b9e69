"""The client against a real vLLM server; log-probabilities against transformers."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch
from aiohttp import web
from tiny import MAX_MODEL_LEN, TOKEN

from megatron_dapo.rollout.engine import Engine, EngineDied, GenerationAborted

PROMPT = [10, 20, 30, 40, 50]
EOS = 1
FOREVER = MAX_MODEL_LEN - len(PROMPT)


@pytest.fixture(scope="module")
def reference(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def expected_logprobs(reference, prompt: list[int], response: tuple[int, ...], temperature: float) -> list[float]:
    tokens = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        scores = torch.log_softmax(reference(tokens).logits[0] / temperature, dim=-1)
    return [float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(response)]


async def idle(engine: Engine) -> bool:
    """Whether the server holds no request, as its prefix cache can only be reset then."""
    try:
        await engine.reset_prefix_cache()
    except RuntimeError:
        return False
    return True


async def wait_until_idle(engine: Engine, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not await idle(engine):
            await asyncio.sleep(0.02)


async def start_endless(engine: Engine, n: int = 4, request_id: str | None = None) -> asyncio.Task:
    """A request that runs until the length limit, and is running now. EOS cannot end it: it would end too early too often."""
    call = engine.generate(PROMPT, n=n, max_tokens=FOREVER, temperature=1e-3, seed=0, weight_version=0, request_id=request_id)
    task = asyncio.create_task(call)
    async with asyncio.timeout(20):
        while await idle(engine):
            assert not task.done()
            await asyncio.sleep(0.01)
    return task


@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_logprobs_are_those_of_transformers(engine, reference, temperature):
    completions = await engine.generate(PROMPT, n=16, max_tokens=200, temperature=temperature, seed=3, weight_version=5)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"} or temperature < 1
    for completion in completions:
        expected = expected_logprobs(reference, PROMPT, completion.tokens, temperature)
        assert list(completion.logprobs) == pytest.approx(expected, abs=1e-4)
        assert completion.weight_version == 5
        # A response that ends by itself ends with the end-of-sequence token, and only that one has it.
        assert (completion.tokens[-1] == EOS) == (completion.finish_reason == "stop")
        assert EOS not in completion.tokens[:-1]
        assert len(completion.tokens) == 200 or completion.finish_reason == "stop"


async def test_other_stop_tokens_end_a_response_too(engine):
    [free] = await engine.generate(PROMPT, n=1, max_tokens=30, temperature=1.0, seed=3, weight_version=0)
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    [stopped] = await engine.generate(
        PROMPT, n=1, max_tokens=30, temperature=1.0, seed=3, weight_version=0, stop_token_ids=[stop, EOS]
    )
    assert stopped.tokens == free.tokens[: first + 1]
    assert stopped.finish_reason == "stop"


async def test_seeds_repeat_samples_and_tell_them_apart(engine):
    async def sample(n: int, seed: int | None) -> list:
        return await engine.generate(PROMPT, n=n, max_tokens=30, temperature=1.0, seed=seed, weight_version=0)

    eight = await sample(8, 100)
    assert [completion.seed for completion in eight] == list(range(100, 108))
    assert len({completion.tokens for completion in eight}) == 8
    assert await sample(8, 100) == eight
    # Sample i has seed + i, whichever request it comes from.
    assert await sample(3, 102) == eight[2:5]
    unseeded = await sample(8, None)
    assert [completion.seed for completion in unseeded] == [None] * 8
    assert {completion.tokens for completion in unseeded} != {completion.tokens for completion in eight}
    with pytest.raises(ValueError, match="seed=-1"):
        await sample(1, -1)


async def test_seeded_samples_do_not_depend_on_what_else_runs(engine):
    """Tokens and log-probabilities are equal bit by bit, alone and among others (CPU, fp32)."""
    alone = await engine.generate(PROMPT, n=2, max_tokens=60, temperature=1.0, seed=7, weight_version=0)
    for shift in range(3):
        others = [
            engine.generate(
                [60 + i, *range(3, 6 + 5 * i + shift)], n=4, max_tokens=20 + 10 * i, temperature=1.0, weight_version=0
            )
            for i in range(8)
        ]
        ours = engine.generate(PROMPT, n=2, max_tokens=60, temperature=1.0, seed=7, weight_version=0)
        together, *_ = await asyncio.gather(ours, *others)
        assert together == alone


async def test_more_seeded_prompts_than_one_step_prefills(engine):
    """Partly prefilled seeded prompts end vLLM's CPU engine; ours must not prefill in parts."""

    async def sample(i: int) -> list:
        return await engine.generate([3 + i] * 300, n=2, max_tokens=4, temperature=1.0, seed=10 * i, weight_version=0)

    together = await asyncio.gather(*(sample(i) for i in range(60)))
    assert [c.tokens for c in await sample(59)] == [c.tokens for c in together[59]]


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
    with pytest.raises(GenerationAborted):
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
    with pytest.raises(GenerationAborted):
        await asyncio.wait_for(task, 5)
    waiting = asyncio.create_task(engine.generate(PROMPT, n=1, max_tokens=3, temperature=1.0, weight_version=0))
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    await engine.resume()
    assert len(await asyncio.wait_for(waiting, 30)) == 1


async def test_errors_quote_the_server(engine, server):
    assert await engine.health()
    with pytest.raises(ValueError, match="max_tokens"):
        await engine.generate(PROMPT, n=1, max_tokens=0, temperature=1.0, weight_version=0)
    with pytest.raises(ValueError, match=r"answered 400.*1024"):  # longer than max_model_len
        await engine.generate([5] * 2000, n=1, max_tokens=1, temperature=1.0, weight_version=0)
    stranger = Engine(server.url, "wrong", request_timeout_s=10)
    with pytest.raises(ValueError, match="answered 401"):
        await stranger.generate(PROMPT, n=1, max_tokens=1, temperature=1.0, weight_version=0)
    await stranger.close()


async def test_a_slow_answer_is_a_timeout_and_aborts(engine, server):
    await start_and_cancel(engine)
    hasty = Engine(server.url, TOKEN, request_timeout_s=0.3)
    with pytest.raises(TimeoutError, match=r"rollout\.request_timeout_s=0\.3"):
        await hasty.generate(PROMPT, n=16, max_tokens=FOREVER, temperature=1e-3, seed=0, weight_version=0)
    await hasty.close()
    await wait_until_idle(engine, 5)


async def start_and_cancel(engine: Engine) -> None:
    """The greedy continuation must be long for the tests here to mean anything."""
    task = await start_endless(engine)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await wait_until_idle(engine, 5)


async def test_nobody_there_is_a_dead_engine():
    engine = Engine("http://127.0.0.1:9", TOKEN, request_timeout_s=10)
    with pytest.raises(EngineDied, match="127.0.0.1:9"):
        await engine.generate(PROMPT, n=1, max_tokens=1, temperature=1.0, weight_version=0)
    with pytest.raises(EngineDied):
        await engine.health()
    await engine.close()
    await engine.close()


class FakeServer:
    """Answers every generate call with one prepared choice or error."""

    def __init__(self, choice: dict | None = None, status: int = 200, text: str = "") -> None:
        self.choice, self.status, self.text = choice, status, text

    async def generate(self, **kwargs):
        async def answer(request):
            if self.status != 200:
                return web.Response(status=self.status, text=self.text)
            return web.json_response({"choices": [self.choice]})

        app = web.Application()
        app.router.add_post("/inference/v1/generate", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        engine = Engine(f"http://127.0.0.1:{runner.addresses[0][1]}", TOKEN, request_timeout_s=10)
        try:
            return await engine.generate(PROMPT, **({"n": 1, "max_tokens": 2, "temperature": 1.0, "weight_version": 4} | kwargs))
        finally:
            await engine.close()
            await runner.cleanup()


def choice(**changes) -> dict:
    content = [{"token_id": 7, "logprob": -0.5}, {"token_id": 8, "logprob": -1.5}]
    return {"index": 0, "token_ids": [7, 8], "finish_reason": "length", "logprobs": {"content": content}} | changes


async def test_the_older_weight_version_counts():
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
    [completion] = await FakeServer(choice(weight_versions=spans)).generate()
    assert completion.weight_version == 3
    [completion] = await FakeServer(choice(weight_versions=[{"version": "default", "start": 0, "end": 2}])).generate()
    assert completion.weight_version == 4


@pytest.mark.parametrize(
    ("fake", "kwargs", "error", "words"),
    [
        (FakeServer(choice(logprobs={"content": [{"logprob": -9999.0}, {"logprob": -1.0}]})), {}, RuntimeError, "not numbers"),
        (FakeServer(choice()), {"n": 2}, RuntimeError, "1 completions of 2"),
        (FakeServer(choice(finish_reason="abort")), {}, GenerationAborted, "abort"),
        (FakeServer(status=500, text="something broke"), {}, RuntimeError, "something broke"),
        (FakeServer(status=500, text="EngineCore encountered an issue"), {}, EngineDied, "EngineCore"),
        (FakeServer(status=503, text="dead"), {}, EngineDied, "503"),
        (FakeServer(status=422, text="no such field"), {}, ValueError, "no such field"),
    ],
)
async def test_strange_answers(fake, kwargs, error, words):
    with pytest.raises(error, match=words) as caught:
        await fake.generate(**kwargs)
    assert type(caught.value) is error
