"""Our own route inside vLLM's API process: vLLM's real output processor, a fake engine core behind it."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.outputs import LogprobsLists

from megatron_dapo.rollout.route import TokenRoute
from megatron_dapo.rollout.wire import EndFrame, ErrorFrame, Frame, FrameDecoder, TokensFrame

LONGEST = 100  # tokens of a prompt


class FakeEngine:
    """AsyncLLM as far as the route uses it. `requests` is what reached the engine core."""

    def __init__(self) -> None:
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.input_processor = SimpleNamespace(
            process_inputs=self._process, assign_request_id=InputProcessor.assign_request_id
        )
        self.engine_core = SimpleNamespace(add_request_async=self._add)
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))
        self.requests: list[EngineCoreRequest] = []
        self.aborted: list[str] = []
        self.errored = self.is_running = False

    def _process(self, request_id, prompt, params, *, supported_tasks) -> EngineCoreRequest:
        if len(prompt["prompt_token_ids"]) > LONGEST:
            raise VLLMValidationError("The decoder prompt is longer than the maximum model length of 100.")
        return EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=prompt["prompt_token_ids"],
            mm_features=None,
            sampling_params=params.clone(),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=prompt.get("cache_salt"),
            data_parallel_rank=None,
        )

    async def _add(self, request: EngineCoreRequest) -> None:
        self.requests.append(request)

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def check_admission(self, n: int) -> None:
        pass

    async def abort(self, names: list[str], internal: bool) -> None:
        self.aborted += self.output_processor.abort_requests(names, internal)

    def put_out(self, number: int, *tokens: int, finish: FinishReason | None = None, version="1") -> None:
        """The engine core sends tokens of the sequence that reached it as `number`, -0.5 each."""
        lists = LogprobsLists(
            np.array([tokens], np.int32).T,
            np.full((len(tokens), 1), -0.5, np.float32),
            np.ones(len(tokens), np.int32),
        )
        output = EngineCoreOutput(
            request_id=self.requests[number].request_id,
            new_token_ids=list(tokens),
            new_logprobs=lists,
            finish_reason=finish,
        )
        self.output_processor.process_outputs([output], weight_version=version)


class Caller:
    """One HTTP request to a route."""

    def __init__(self, route: TokenRoute, engine: Any, method: str, path: str, body: Any = None) -> None:
        self.messages: list[dict[str, Any]] = []
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._decoder = FrameDecoder()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._incoming.put_nowait({"type": "http.request", "body": data[:5], "more_body": True})
        self._incoming.put_nowait({"type": "http.request", "body": data[5:]})
        state = SimpleNamespace(engine_client=engine, server=SimpleNamespace(should_exit=False))
        self.server = state.server
        scope = {"method": method, "path": path, "app": SimpleNamespace(state=state)}
        self.task = asyncio.ensure_future(route(scope, self._incoming.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def disconnect(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def frames(self) -> list[Frame]:
        """Those that came since the last call."""
        await settle()
        pieces = [m["body"] for m in self.messages if m["type"] == "http.response.body"]
        self.messages = [m for m in self.messages if m["type"] != "http.response.body"]
        return [frame for piece in pieces for frame in self._decoder.feed(piece)]

    async def answer(self) -> tuple[int, str]:
        """Status and words of an answer that is no stream."""
        await self.task
        start, body = self.messages
        return start["status"], json.loads(body["body"])["error"]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


BODY = {"token_ids": [10, 20], "n": 2, "max_tokens": 9, "seed": 100}


async def generating(engine: Any, route: TokenRoute | None = None, **changes: Any) -> Caller:
    caller = Caller(route or TokenRoute(), engine, "POST", "/megatron_dapo/v1/generate", BODY | changes)
    await settle()
    return caller


def content(frame: Frame) -> tuple:
    assert isinstance(frame, TokensFrame)
    assert frame.logprobs.tolist() == [-0.5] * len(frame.tokens)
    return frame.index, frame.tokens.tolist(), frame.finish_reason, frame.runs


async def test_sequences_are_seeded_as_vllm_seeds_them_and_sent_as_they_end():
    engine = FakeEngine()
    caller = await generating(engine, temperature=0.5, cache_salt="7", stop_token_ids=[3])
    params = [request.sampling_params for request in engine.requests]
    assert [(p.n, p.seed, p.max_tokens, p.temperature, p.stop_token_ids) for p in params] == [
        (1, 100, 9, 0.5, [3]),
        (1, 101, 9, 0.5, [3]),
    ]
    assert all(p.output_kind is RequestOutputKind.FINAL_ONLY and p.logprobs == 0 for p in params)
    assert [request.prompt_token_ids for request in engine.requests] == [[10, 20]] * 2
    assert {request.cache_salt for request in engine.requests} == {"7"}
    assert len({request.request_id for request in engine.requests}) == 2

    engine.put_out(0, 5, 6)
    engine.put_out(1, 7, finish=FinishReason.STOP)
    [frame] = await caller.frames()
    assert content(frame) == (1, [7], "stop", (("1", 1),))
    engine.put_out(0, 8, version="2")
    assert await caller.frames() == []
    engine.put_out(0, 9, finish=FinishReason.LENGTH, version="2")
    frame, end = await caller.frames()
    assert content(frame) == (0, [5, 6, 8, 9], "length", (("1", 2), ("2", 2)))
    assert end == EndFrame(count=2)
    await caller.task
    assert caller.messages[0]["status"] == 200 and engine.aborted == []
    assert not engine.output_processor.external_req_ids


async def test_sequences_go_on_from_beginnings():
    engine = FakeEngine()
    await generating(engine, began=[[], [5, 6]], numbers=[2, 5])
    assert [request.prompt_token_ids for request in engine.requests] == [[10, 20], [10, 20, 5, 6]]
    first, second = (request.sampling_params for request in engine.requests)
    assert (first.max_tokens, second.max_tokens) == (9, 7)
    assert first.seed == 102 and second.seed not in range(100, 110)
    assert {request.external_req_id for request in engine.requests} == {engine.requests[0].external_req_id}


async def test_partials_are_what_named_requests_have_so_far():
    engine, route = FakeEngine(), TokenRoute()
    await generating(engine, route, request_id="a")
    await generating(engine, route)
    engine.put_out(0, 5, 6)
    engine.put_out(0, 8, version="2")
    engine.put_out(1, 7, finish=FinishReason.STOP)
    engine.put_out(2, 4)
    await settle()
    asking = Caller(route, engine, "GET", "/megatron_dapo/v1/partials")
    *frames, end = await asking.frames()
    assert [content(frame) for frame in frames] == [
        (0, [5, 6, 8], None, (("1", 2), ("2", 1))),
        (1, [7], "stop", (("1", 1),)),
    ]
    assert [frame.request_id for frame in frames if isinstance(frame, TokensFrame)] == ["a", "a"]
    assert end == EndFrame(count=2)


async def test_a_sequence_without_a_token_has_an_empty_beginning():
    engine, route = FakeEngine(), TokenRoute()
    await generating(engine, route, request_id="a", n=1)
    frame, _ = await Caller(route, engine, "GET", "/megatron_dapo/v1/partials").frames()
    assert content(frame) == (0, [], None, ())


async def test_progress_counts_tokens_as_they_come():
    engine, route = FakeEngine(), TokenRoute()
    await generating(engine, route)
    engine.put_out(0, 5, 6)
    engine.put_out(1, 7, finish=FinishReason.STOP)
    asking = Caller(route, engine, "GET", "/megatron_dapo/v1/progress")
    await asking.task
    assert json.loads(asking.messages[1]["body"]) == {"tokens": 3}


async def test_a_client_that_goes_away_ends_its_request():
    engine, route = FakeEngine(), TokenRoute()
    caller = await generating(engine, route, request_id="a")
    engine.put_out(1, 7, finish=FinishReason.STOP)
    await settle()
    caller.disconnect()
    await caller.task
    assert engine.aborted == [engine.requests[0].request_id]  # the other one had ended
    frames = await Caller(route, engine, "GET", "/megatron_dapo/v1/partials").frames()
    assert frames == [EndFrame(count=0)]


async def test_a_request_that_is_aborted_by_name_says_so():
    engine = FakeEngine()
    caller = await generating(engine, request_id="mine")
    engine.put_out(0, 5)
    await engine.abort(["megatron_dapo-mine"], internal=False)
    first, second, end = await caller.frames()
    assert [content(first)[:3], content(second)[:3]] == [(0, [5], "abort"), (1, [], "abort")]
    assert end == EndFrame(count=2)


async def test_an_engine_that_dies_ends_its_requests_and_its_server():
    engine = FakeEngine()
    caller = await generating(engine)
    engine.errored = True
    engine.output_processor.propagate_error(EngineDeadError())
    await caller.task
    [frame] = await caller.frames()
    assert isinstance(frame, ErrorFrame) and (frame.status, frame.reason) == (503, "engine_died")
    assert "EngineCore encountered" in frame.text
    assert caller.server.should_exit  # as vLLM's own routes do
    later = await generating(engine)
    assert (await later.answer())[0] == 503


async def test_another_error_of_the_engine_fails_the_request():
    engine = FakeEngine()
    caller = await generating(engine)
    engine.output_processor.propagate_error(KeyError("odd"))
    await caller.task
    [frame] = await caller.frames()
    assert isinstance(frame, ErrorFrame) and (frame.status, frame.reason) == (500, "server_error")
    assert "KeyError" in frame.text and not caller.server.should_exit
    assert len(engine.aborted) == 2


async def test_a_name_that_is_used_twice_is_the_newest_requests():
    """A client may make a request again before the server has noticed that the first connection is gone."""
    engine, route = FakeEngine(), TokenRoute()
    old = await generating(engine, route, request_id="a", n=1)
    await generating(engine, route, request_id="a", n=1)
    engine.put_out(1, 5)
    old.disconnect()
    await old.task
    frame, _ = await Caller(route, engine, "GET", "/megatron_dapo/v1/partials").frames()
    assert content(frame)[1] == [5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 9}, "n must be from 1 to the server's max_num_seqs=8, got 9"),
        ({"n": 0}, "got 0"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 0}, "greedy"),
        ({"token_ids": [-1]}, "token_ids.0"),
        ({"token_ids": [1] * 101}, "longer than the maximum model length of 100"),
        ({"began": [[1]]}, "began must have one entry for each of n=2, got 1"),
        ({"numbers": [1]}, "numbers must have one entry"),
        ({"began": [[], [1] * 9]}, "max_tokens"),
        ({"began": [[], [1] * 99], "max_tokens": 200}, "longer than"),
        ({"top_k": 3}, "top_k"),
        ({"n": "many"}, "n: "),
    ],
)
async def test_what_cannot_be_sampled_is_refused_with_words(changes, words):
    engine = FakeEngine()
    status, text = await (await generating(engine, **changes)).answer()
    assert status == 400 and words in text
    assert engine.requests == [] and not engine.output_processor.request_states


async def test_a_broken_body_and_an_unknown_path_are_refused():
    engine = FakeEngine()
    broken = Caller(TokenRoute(), engine, "POST", "/megatron_dapo/v1/generate", b"{nothing")
    assert (await broken.answer())[0] == 400
    for method, path in (("GET", "/megatron_dapo/v1/generate"), ("POST", "/megatron_dapo/v2/generate")):
        assert (await Caller(TokenRoute(), engine, method, path).answer())[0] == 404


async def test_another_vllm_has_no_such_route():
    status, text = await (await generating(SimpleNamespace(output_processor=None))).answer()
    assert status == 404 and "another shape" in text
