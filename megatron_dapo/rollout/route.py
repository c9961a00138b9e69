"""Our own route in the API process of a vLLM server: tokens in as JSON, tokens out as frames (wire.py).

    POST /megatron_dapo/v1/generate   a group: n sequences of one prompt; each is sent when it ends
    GET  /megatron_dapo/v1/partials   what all running requests with a `request_id` have sampled so far
    GET  /megatron_dapo/v1/progress   {"tokens": sampled over this route since the server started}

The server itself is unmodified: middleware.py hands these paths over, with the AsyncLLM that vLLM's own
routes use. A request is checked by vLLM's input processor and its sequences are seeded as vLLM's
ParentRequest does, so it samples the tokens of /inference/v1/generate. What differs is how tokens are
collected: in arrays, and not one by one (sync/vllm/outputs.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from array import array
from collections.abc import AsyncIterator, Callable
from copy import copy
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from vllm.entrypoints.launchers.launcher import terminate_if_errored
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.logprobs import LogprobsProcessor

from megatron_dapo.environment import REQUEST_PREFIX
from megatron_dapo.rollout.wire import (
    CONTENT_TYPE,
    GENERATE_PATH,
    PARTIALS_PATH,
    PROGRESS_PATH,
    EndFrame,
    ErrorFrame,
    Frame,
    TokensFrame,
    encode,
    sequence_seed,
)

# What is used of AsyncLLM beyond its public methods; without it there is no such route on this server (404).
NEEDED = ("output_processor", "input_processor", "engine_core", "check_admission", "errored", "is_running")

log = logging.getLogger("vllm.megatron_dapo")


class GenerateBody(BaseModel):
    """What a client asks for.

    began: n lists of tokens that the sequences have sampled already. numbers: which of its prompt's sequences
    each is, for its seed; 0 to n - 1 if left out.
    """

    model_config = ConfigDict(extra="forbid")

    token_ids: list[NonNegativeInt]
    n: int = 1
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: list[int] = []
    seed: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    began: list[list[NonNegativeInt]] | None = None
    numbers: list[NonNegativeInt] | None = None


class Answer(Exception):
    """An HTTP answer other than 200, with words."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class SampledLogprobs(LogprobsProcessor):
    """Collects the sampled token's log-probability alone, as floats end to end."""

    values: array
    count: Callable[[int], None]  # is called with the number of tokens that have come

    def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
        sampled = logprobs_lists.logprobs[:, 0]
        self.values.frombytes(np.ascontiguousarray(sampled, np.float32).tobytes())
        self.count(len(sampled))


class Group:
    """The running sequences of one request. vLLM's output processor calls `put`."""

    def __init__(self, request_id: str | None, n: int) -> None:
        self.request_id = request_id
        self.name = request_id or uuid.uuid4().hex
        self.states: list[Any] = []  # vLLM's RequestState of each sequence
        self.finished: dict[int, TokensFrame] = {}
        self._n = n
        self._arrived: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, output: Any) -> None:
        """Called with vLLM's RequestOutput of a sequence that has ended, or with an exception."""
        self._arrived.put_nowait(output)

    async def frames(self) -> AsyncIterator[list[TokensFrame]]:
        """A frame for each sequence, in the order of their ends; those that end at the same time together."""
        while len(self.finished) < self._n:
            outputs = [await self._arrived.get()]
            while not self._arrived.empty():
                outputs.append(self._arrived.get_nowait())
            yield [self._end(output) for output in outputs]

    def partials(self) -> list[TokensFrame]:
        """What each sequence has, finished or not."""
        return [self.finished.get(i) or self._frame(i, None) for i in range(self._n)]

    def _end(self, output: Any) -> TokensFrame:
        """The frame of a sequence that has ended."""
        if isinstance(output, BaseException):
            raise output
        [completion] = output.outputs
        frame = self._frame(completion.index, completion.finish_reason)
        self.finished[completion.index] = frame
        self.states[completion.index] = None  # which holds the tokens a second time
        return frame

    def _frame(self, index: int, finish_reason: str | None) -> TokensFrame:
        state = self.states[index]
        tokens = np.array(state.detokenizer.token_ids, dtype=np.int32)
        logprobs = np.array(state.logprobs_processor.values, dtype=np.float32)
        starts = state.weight_version_starts
        ends = [*(start for _, start in starts), len(tokens)][1:] if starts else []
        return TokensFrame(
            index=index,
            finish_reason=finish_reason,
            tokens=tokens,
            logprobs=logprobs,
            runs=tuple((label, end - start) for (label, start), end in zip(starts, ends, strict=True)),
            request_id=self.request_id,
        )


class TokenRoute:
    """An ASGI application of the three paths. One object serves a process."""

    def __init__(self) -> None:
        self._tokens = 0
        self._groups: dict[str, Group] = {}  # running; the newest, if a client uses a name twice

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        state = scope["app"].state
        engine: Any = getattr(state, "engine_client", None)
        if not all(hasattr(engine, name) for name in NEEDED):
            text = "this vLLM's engine has another shape; use /inference/v1/generate"
            return await _answer(send, 404, {"error": text})
        try:
            if (scope["path"], scope["method"]) == (GENERATE_PATH, "POST"):
                await self._generate(engine, await _body(receive), receive, send)
            elif (scope["path"], scope["method"]) == (PARTIALS_PATH, "GET"):
                await self._partials(send)
            elif (scope["path"], scope["method"]) == (PROGRESS_PATH, "GET"):
                await _answer(send, 200, {"tokens": self._tokens})
            else:
                raise Answer(404, f"there is no {scope['method']} {scope['path']} here")
        except Answer as answer:
            await _answer(send, answer.status, {"error": str(answer)})
        finally:
            if (server := getattr(state, "server", None)) is not None:
                terminate_if_errored(server, engine)  # as vLLM's own routes do

    async def _generate(self, engine: Any, body: bytes, receive: Any, send: Any) -> None:
        """Sample a group. A client that goes away ends it."""
        group, requests = _prepared(engine, body, await _supported_tasks(engine))
        tasks: list[asyncio.Task[None]] = []
        try:
            for i, request in enumerate(requests):
                _register(engine, group, request, i, self._count)
            self._groups[group.name] = group
            tasks.append(asyncio.create_task(self._submit_and_send(engine, group, requests, send)))
            tasks.append(asyncio.create_task(_disconnected(receive)))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._groups.get(group.name) is group:
                del self._groups[group.name]
            states = engine.output_processor.request_states
            running = [request.request_id for request in requests if request.request_id in states]
            if running and not engine.errored:
                await engine.abort(running, internal=True)
        if not tasks[0].cancelled():
            tasks[0].result()

    async def _submit_and_send(self, engine: Any, group: Group, requests: list[Any], send: Any) -> None:
        """The whole answer; after its beginning an error is a frame."""
        try:
            for request in requests:
                await engine.engine_core.add_request_async(request)
        except EngineDeadError as error:
            raise Answer(503, str(error)) from error
        await _begin(send)
        try:
            async for frames in group.frames():
                await _write(send, *frames)
            last: Frame = EndFrame(count=len(requests))
        except EngineDeadError as error:
            last = ErrorFrame(status=503, reason="engine_died", text=str(error))
        except Exception as error:
            log.exception("a request of %s failed", GENERATE_PATH)
            last = ErrorFrame(status=500, reason="server_error", text=f"{type(error).__name__}: {error}")
        await _write(send, last, more=False)

    def _count(self, tokens: int) -> None:
        self._tokens += tokens

    async def _partials(self, send: Any) -> None:
        groups = [group for group in self._groups.values() if group.request_id is not None]
        frames = [frame for group in groups for frame in group.partials()]
        await _begin(send)
        await _write(send, *frames, EndFrame(count=len(frames)), more=False)


def _prepared(engine: Any, body: bytes, supported_tasks: Any) -> tuple[Group, list[Any]]:
    """The group that a body asks for, and its sequences as vLLM's EngineCoreRequests. Answer if vLLM would
    refuse it.
    """
    try:
        asked = GenerateBody.model_validate_json(body)
        most = engine.vllm_config.scheduler_config.max_num_seqs
        if not 0 < asked.n <= most:
            raise Answer(400, f"n must be from 1 to the server's max_num_seqs={most}, got {asked.n}")
        for name in ("began", "numbers"):
            if (given := getattr(asked, name)) is not None and len(given) != asked.n:
                raise Answer(400, f"{name} must have one entry for each of n={asked.n}, got {len(given)}")
        if engine.errored:
            raise EngineDeadError()
        engine.check_admission(asked.n)
        group = Group(asked.request_id, asked.n)
        requests = _requests(engine, group, asked, supported_tasks)
    except ValidationError as error:
        text = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise Answer(400, text) from error
    except EngineDeadError as error:
        raise Answer(503, str(error)) from error
    except GracefulHTTPError as error:
        raise Answer(int(error.status_code), str(error)) from error
    except (VLLMClientError, ValueError, TypeError, OverflowError) as error:
        raise Answer(400, str(error)) from error
    return group, requests


def _requests(engine: Any, group: Group, asked: GenerateBody, supported_tasks: Any) -> list[Any]:
    """vLLM's requests of one sequence each, made as its ParentRequest makes them of one with n."""

    def processed(n: int, began: list[int]) -> Any:
        params = SamplingParams(
            n=n,
            max_tokens=asked.max_tokens - len(began),
            temperature=asked.temperature,
            top_p=asked.top_p,
            stop_token_ids=asked.stop_token_ids,
            seed=asked.seed,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input([*asked.token_ids, *began], cache_salt=asked.cache_salt)
        process = engine.input_processor.process_inputs
        return process(external, prompt, params, supported_tasks=supported_tasks)

    external = REQUEST_PREFIX + group.name
    whole = processed(asked.n, [])
    engine.input_processor.assign_request_id(whole)
    requests = []
    for i in range(asked.n):
        began = asked.began[i] if asked.began else []
        child = processed(1, began) if began else copy(whole)
        child.external_req_id = external
        child.request_id = f"{whole.request_id}-{i}"
        child.sampling_params = copy(child.sampling_params)
        child.sampling_params.n = 1
        if asked.seed is not None:
            number = asked.numbers[i] if asked.numbers else i
            child.sampling_params.seed = sequence_seed(asked.seed, number, len(began))
        requests.append(child)
    return requests


def _register(engine: Any, group: Group, request: Any, index: int, count: Callable[[int], None]) -> None:
    """Tell vLLM's output processor of a sequence, and let it collect tokens in arrays."""
    processor = engine.output_processor
    processor.add_request(request, None, None, index, group)
    state = processor.request_states[request.request_id]
    state.detokenizer.token_ids = array("i")
    collected = SampledLogprobs(**vars(state.logprobs_processor))
    collected.values = collected.logprobs = array("f")  # type: ignore[assignment]
    collected.count = count
    state.logprobs_processor = collected
    group.states.append(state)


async def _supported_tasks(engine: Any) -> Any:
    try:
        return await engine.get_supported_tasks()
    except EngineDeadError as error:
        raise Answer(503, str(error)) from error


# --- HTTP


async def _body(receive: Any) -> bytes:
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Answer(400, "the client went away")
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(pieces)


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _begin(send: Any) -> None:
    headers = [(b"content-type", CONTENT_TYPE.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _write(send: Any, *frames: Frame, more: bool = True) -> None:
    body = b"".join(encode(frame) for frame in frames)
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _answer(send: Any, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
