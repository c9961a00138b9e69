"""Sampled tokens leave vLLM's engine core in bundles instead of one by one.

After each step of the model the engine core sends every sequence's new token with its three arrays of
log-probabilities to the API process, which unpacks, counts and appends them: 50 us a token on a slow core.
Nobody reads single tokens of the requests of rollout/route.py, so those are kept in the engine core until
their sequence ends or HOLD_S have passed, and then go out as one output with all of them, which costs about
as much as one token did. What is kept goes out before a pause completes and before the weight version
changes, so each bundle is of one version. (vLLM's histogram of the time between tokens then shows bundles.)

Two methods of vLLM's EngineCore and one of its Scheduler are wrapped. If this vLLM has them not as expected,
nothing is wrapped: tokens then travel one by one, which costs time and changes no result.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_dapo.environment import REQUEST_PREFIX

HOLD_S = 4.0  # 80 tokens of a sequence of a large model
BEAT_S = 0.5  # the oldest bundle leaves at least this often, so that whoever counts tokens sees them move
# What an output of our requests may have, and how those of several steps become one; an output with anything
# else is sent as it is.
MERGED = {"request_id", "new_token_ids", "new_logprobs", "finish_reason", "stop_reason", "events"}
MERGED |= {"prefill_stats", "num_nans_in_logits", "trace_headers", "spec_decode_metrics"}
ATTRIBUTE = "_megatron_dapo_held"

log = logging.getLogger("vllm.megatron_dapo")


class Bundle(NamedTuple):
    """Outputs of one request for one API process (`client`), kept since the first of them came."""

    client: int
    since: float
    parts: list[Any]


class HeldOutputs:
    """The outputs that one engine core keeps back."""

    def __init__(self) -> None:
        self.version: str | None = None  # of the weights that sampled what is kept
        self._kept: dict[str, Bundle] = {}  # by request, the oldest first
        self._left_at = 0.0  # when the last bundle was due

    def hold(self, outputs: dict[int, Any], now: float) -> None:
        """Take outputs that can wait out of a step's `outputs`; put in those that are due. Messages that say
        nothing any more are taken out too.
        """
        for client, message in outputs.items():
            message.outputs = self._let_through(client, message.outputs, now)
        for client, due in self._due(now).items():
            if client in outputs:
                outputs[client].outputs.extend(due)
            else:
                outputs[client] = _message(due)
        for client in [client for client, message in outputs.items() if _is_empty(message)]:
            del outputs[client]

    def take(self) -> dict[int, list[Any]]:
        """All that is kept, one output for each request."""
        return self._out(list(self._kept))

    def _due(self, now: float) -> dict[int, list[Any]]:
        """What has waited for HOLD_S, and the oldest if nothing has left for BEAT_S."""
        names = []
        for name, bundle in self._kept.items():
            if now - bundle.since < HOLD_S and (names or now - max(bundle.since, self._left_at) < BEAT_S):
                break
            names.append(name)
        if names:
            self._left_at = now
        return self._out(names)

    def _out(self, names: Sequence[str]) -> dict[int, list[Any]]:
        due: dict[int, list[Any]] = {}
        for name in names:
            bundle = self._kept.pop(name)
            due.setdefault(bundle.client, []).append(merged(bundle.parts))
        return due

    def _let_through(self, client: int, outputs: Sequence[Any], now: float) -> list[Any]:
        """The outputs that do not wait, each with what was kept of its request."""
        through = []
        for output in outputs:
            name = output.request_id
            if not name.startswith(REQUEST_PREFIX):
                through.append(output)
            elif output.finish_reason is None and _is_plain(output):
                if (bundle := self._kept.get(name)) is None:
                    self._kept[name] = Bundle(client, now, [output])
                else:
                    bundle.parts.append(output)
            else:
                bundle = self._kept.pop(name, None)
                parts = bundle.parts if bundle is not None else []
                if _is_plain(output):
                    through.append(merged([*parts, output]))
                else:
                    through += [merged(parts), output] if parts else [output]
        return through


def merged(parts: Sequence[Any]) -> Any:
    """One output with the tokens of consecutive outputs of a request."""
    first, last = parts[0], parts[-1]
    if first is last:
        return first
    lists = [part.new_logprobs for part in parts if part.new_logprobs is not None]
    events = [event for part in parts for event in part.events or ()]
    return type(first)(
        request_id=first.request_id,
        new_token_ids=[token for part in parts for token in part.new_token_ids],
        new_logprobs=_joined(lists) if lists else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        events=events or None,
        prefill_stats=next((part.prefill_stats for part in parts if part.prefill_stats is not None), None),
        num_nans_in_logits=last.num_nans_in_logits,
        trace_headers=last.trace_headers,
        spec_decode_metrics=last.spec_decode_metrics,
    )


def _joined(lists: Sequence[Any]) -> Any:
    """vLLM's LogprobsLists of consecutive tokens end to end."""
    columns = zip(*((part[0], part[1], part[2]) for part in lists), strict=True)
    return type(lists[0])(*(np.concatenate(column) for column in columns), None)


def _is_plain(output: Any) -> bool:
    return all(getattr(output, name) is None for name in _unmergeable(type(output)))


@functools.cache
def _unmergeable(kind: type) -> tuple[str, ...]:
    return tuple(name for name in kind.__struct_fields__ if name not in MERGED)  # type: ignore[attr-defined]


def _is_empty(message: Any) -> bool:
    """Whether a message to an API process says nothing."""
    return not (message.outputs or message.finished_requests or message.scheduler_stats is not None)


def _message(outputs: list[Any], version: str | None = None) -> Any:
    from vllm.v1.engine import EngineCoreOutputs

    return EngineCoreOutputs(outputs=outputs, weight_version=version)


def hold_outputs() -> None:
    """Wrap the engine core, in whatever process this is; only an engine core calls what is wrapped."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.outputs import LogprobsLists

    if hasattr(EngineCore, ATTRIBUTE):
        return
    columns = ("logprob_token_ids", "logprobs", "sampled_token_ranks", "cu_num_generated_tokens")
    known = (
        _parameters(EngineCore, "_attach_weight_version") == ["self", "outputs"]
        and _parameters(EngineCore, "_finish_pause") == ["self", "clear_cache"]
        and _parameters(Scheduler, "make_stats")[:2] == ["self", "spec_decoding_stats"]
        and LogprobsLists._fields == columns
        and set(EngineCoreOutput.__struct_fields__) >= MERGED
    )
    if not known:
        log.warning("this vLLM's engine core has another shape; each token travels alone, which costs time")
        return
    setattr(EngineCore, ATTRIBUTE, None)
    EngineCore._attach_weight_version = _holding(EngineCore._attach_weight_version)
    EngineCore._finish_pause = _flushing(EngineCore._finish_pause)
    Scheduler.make_stats = _seldom(Scheduler.make_stats)


def _holding(attach: Callable[..., None]) -> Callable[..., None]:
    """EngineCore._attach_weight_version, called with each step's outputs, but holding some of them back."""

    @functools.wraps(attach)
    def attach_weight_version(core: Any, outputs: dict[int, Any]) -> None:
        held = getattr(core, ATTRIBUTE)
        if held is None:
            held = HeldOutputs()
            setattr(core, ATTRIBUTE, held)
        if held.version != core._weight_version:
            _flush(core)
            held.version = core._weight_version
        held.hold(outputs, time.monotonic())
        attach(core, outputs)

    return attach_weight_version


def _flushing(finish: Callable[..., None]) -> Callable[..., None]:
    """EngineCore._finish_pause, called when nothing runs any more and before the pause is confirmed."""

    @functools.wraps(finish)
    def finish_pause(core: Any, clear_cache: bool) -> None:
        _flush(core)
        finish(core, clear_cache)

    return finish_pause


def _flush(core: Any) -> None:
    held = getattr(core, ATTRIBUTE)
    if held is not None:
        for client, due in held.take().items():
            core.output_queue.put_nowait((client, _message(due, held.version)))


def _seldom(make: Callable[..., Any]) -> Callable[..., Any]:
    """Scheduler.make_stats once within BEAT_S, and always when nothing is left to do.

    The counters of the prefix cache go on adding up meanwhile. What only one step knows is never left out.
    """

    @functools.wraps(make)
    def make_stats(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        now = time.monotonic()
        only_here = any(value is not None for value in (*args, *kwargs.values()))
        if not only_here and now < getattr(scheduler, ATTRIBUTE, 0.0) and any(scheduler.get_request_counts()):
            return None
        setattr(scheduler, ATTRIBUTE, now + BEAT_S)
        return make(scheduler, *args, **kwargs)

    return make_stats


def _parameters(owner: type, name: str) -> list[str]:
    method = getattr(owner, name, None)
    return list(inspect.signature(method).parameters) if method is not None else []
