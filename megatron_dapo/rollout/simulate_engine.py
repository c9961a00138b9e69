"""A simulated engine on virtual time: its scheduler, its cache, its faults.

Running sequences share the engine evenly. One counter, `_progress`, says how many tokens each running
sequence has made since the engine's clock began; a sequence that enters at counter c with L tokens to go
ends when the counter reaches c + L. So the next end is the smallest mark of a heap, and an event costs
O(log n) whatever n is.

A paused engine (a weight push) and one that sleeps (its GPUs train) make no tokens; what runs in it goes on
afterwards. Each sequence knows which weight versions its tokens are of.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_dapo.rollout.errors import EngineDied, EngineStalled
from megatron_dapo.rollout.simulate_clock import Meter
from megatron_dapo.rollout.simulate_model import Fault, Profile, speed_at
from megatron_dapo.types import VersionRuns

CLOSE = 1e-6  # tokens: an end that is this near has come
HEADROOM = 0.01  # share of the cache that must stay free when a waiting sequence is let in
GANTT_LEVELS = 16  # steps in which the number of running sequences is drawn


@dataclass(slots=True, eq=False)
class Response:
    """One sequence on its way: `length` tokens of which `made` exist (those since `entered` not counted).

    number: which of its request's sequences. entered: the engine's progress when it began to run; None while
    it waits. entry: counts its entries, so that marks of earlier entries are known to be void. runs: weight
    versions of its tokens up to the last change of the weights.
    """

    request: Request
    number: int
    length: int
    made: float = 0.0
    runs: VersionRuns = ()
    entered: float | None = None
    entry: int = 0

    @property
    def is_over(self) -> bool:
        return self.entered is None and self.made >= self.length


@dataclass(slots=True, eq=False)
class Request:
    """The sequences of one generate call. Done when all have ended; `is_read`: its prompt is in the cache.
    ended: called with each sequence when it has ended.
    """

    prompt_tokens: int
    done: asyncio.Future[None]
    ended: Callable[[Response], None]
    sequences: list[Response] = field(default_factory=list)
    missing: int = 0
    is_read: bool = False


class Engine:
    """One server with its scheduler. Use it inside a running (virtual) loop.

    max_running: sequences it runs at once. stalled_after_s: without a token, requests fail. phase: what the
    run does now (rollout, trainer, sync), by which `time_in` counts busy, idle, asleep and down seconds.
    levels: (second, running sequences) for the picture. version: of its weights; None since it started.
    starts_fail, warm_ups_fail: how many of the next ones will.
    """

    def __init__(
        self, index: int, profile: Profile, *, max_running: int, stalled_after_s: float, meter: Meter
    ) -> None:
        self.index, self.profile, self.meter = index, profile, meter
        self.phase = "start"
        self.time_in: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.levels: list[tuple[float, int]] = []
        self.tokens = 0.0  # made since the beginning
        self.preemptions = 0
        self.is_up = self.is_stalled = self.is_paused = self.is_asleep = False
        self.version: int | None = None
        self.starts_fail = self.warm_ups_fail = 0
        self.failing = 0.0  # share of requests that fail
        self._max_running, self._stalled_after_s, self._slower_by = max_running, stalled_after_s, 1.0
        self._running: dict[Response, None] = {}  # in the order of entry
        self._waiting: deque[Response] = deque()
        self._requests: dict[Request, None] = {}
        self._marks: list[tuple[float, int, Response, int]] = []
        self._numbers = itertools.count()
        self._progress, self._at = 0.0, 0.0
        self._reading_s = 0.0  # prompts that are read before decoding goes on
        self._read = 0.0  # prompt tokens
        self._cached = 0.0  # KV tokens of the running sequences, less running x progress
        self._timer: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._is_planned = False
        self._speeds: dict[int, float] = {}
        self._level = -1

    # --- what a client asks

    def submit(
        self,
        prompt_tokens: int,
        lengths: Sequence[int],
        *,
        began: Sequence[VersionRuns] = (),
        ended: Callable[[Response], None] = lambda sequence: None,
    ) -> Request:
        """Queue one request; await its `done`. began: what there is of each sequence already."""
        with self.meter:
            self._advance()
            request = Request(prompt_tokens, asyncio.get_running_loop().create_future(), ended)
            for number, (length, runs) in enumerate(zip(lengths, began or [()] * len(lengths), strict=True)):
                made = float(sum(count for _, count in runs))
                request.sequences.append(Response(request, number, length, made=made, runs=runs))
            waiting = [sequence for sequence in request.sequences if not sequence.is_over]
            request.missing = len(waiting)
            if not waiting:
                request.done.set_result(None)
                return request
            self._requests[request] = None
            self._waiting.extend(waiting)
            self._plan_soon()
            if self.is_stalled:
                self._declare_stalled_later()
            return request

    def runs(self, sequence: Response) -> VersionRuns:
        """The weight versions of the tokens that the sequence has made by now."""
        with self.meter:
            self._advance()
            return self._runs(sequence)

    def drop(self, request: Request) -> int:
        """End a request early; the tokens that it had made."""
        with self.meter:
            self._advance()
            made = 0
            for sequence in request.sequences:
                made += int(self._made(sequence) + CLOSE)
                if sequence.entered is not None:
                    self._leave(sequence)
            if not all(sequence.is_over for sequence in request.sequences):
                self._waiting = deque(s for s in self._waiting if s.request is not request)
            self._requests.pop(request, None)
            self._plan_soon()
            return made

    def work(self) -> tuple[float, float, float]:
        """What it has done since the beginning: decoding steps, tokens made, prompt tokens read."""
        self._account()
        unread = self._reading_s * self.profile.prefill_tokens_per_second
        return self._progress, self.tokens, self._read - unread

    def sequences(self) -> int:
        return len(self._running) + len(self._waiting)

    # --- what happens to it

    def start(self) -> None:
        self._account()
        self.is_up, self.is_stalled, self.is_paused = True, False, False
        self._slower_by, self.failing = 1.0, 0.0
        self._speeds.clear()

    def stop(self) -> None:
        self.end_requests(EngineDied(f"simulated engine {self.index} was stopped"))
        self._account()
        self.is_up, self.version = False, None

    def hold(self, *, paused: bool | None = None, asleep: bool | None = None) -> None:
        """Stop making tokens, or go on; what runs stays as it is. None: as it was."""
        self._account()
        self.is_paused = self.is_paused if paused is None else paused
        self.is_asleep = self.is_asleep if asleep is None else asleep
        if self._watch is not None:  # no time passes for it while the engine is held
            self._watch.cancel()
            self._watch = None
        if self.is_stalled:
            self._declare_stalled_later()
        self._plan_soon()

    def load_weights(self, version: int) -> None:
        """From now on tokens are of this version."""
        with self.meter:
            self._advance()
            for request in self._requests:
                for sequence in request.sequences:
                    if not sequence.is_over:
                        sequence.runs = self._runs(sequence)
            self.version = version

    def strike(self, fault: Fault) -> None:
        """Let the fault happen now. Nothing happens to an engine that is down."""
        if not self.is_up:
            return
        self._advance()
        if fault.kind == "death":
            self.starts_fail, self.warm_ups_fail = fault.starts_fail, fault.warm_ups_fail
            self.stop()
        elif fault.kind == "failing":
            self.failing = fault.share
        elif fault.kind == "stall":
            self.is_stalled = True
            self._declare_stalled_later()
        else:
            self._slower_by = fault.factor
            self._speeds.clear()
        self._plan_soon()

    def set_phase(self, phase: str) -> None:
        self._account()
        self.phase = phase

    # --- the schedule

    def _advance(self) -> None:
        """Bring the counters to now."""
        now = asyncio.get_running_loop().time()
        seconds, self._at = now - self._at, now
        state = self._state()
        self.time_in[self.phase, state] += seconds
        if state != "busy":
            return
        reading = min(seconds, self._reading_s)
        self._reading_s -= reading
        more = (seconds - reading) * self._rate()
        self._progress += more
        self.tokens += more * len(self._running)

    def _account(self) -> None:
        with self.meter:
            self._advance()

    def _state(self) -> str:
        if not self.is_up or self.version is None or self.is_stalled:
            return "down"
        if self.is_asleep:
            return "asleep"
        return "busy" if self._running and not self.is_paused else "idle"

    def _runs(self, sequence: Response) -> VersionRuns:
        made = int(self._made(sequence) + CLOSE) - sum(count for _, count in sequence.runs)
        if made <= 0 or self.version is None:
            return sequence.runs
        *before, last = sequence.runs or ((self.version, 0),)
        if last[0] == self.version:
            return (*before, (self.version, last[1] + made))
        return (*before, last, (self.version, made))

    def _rate(self) -> float:
        """Tokens/s of one running sequence."""
        running = len(self._running)
        if running not in self._speeds:
            speed = speed_at(self.profile.tokens_per_second, running)
            self._speeds[running] = speed / running / self._slower_by
        return self._speeds[running]

    def _used(self) -> float:
        """KV tokens of the running sequences."""
        return self._cached + len(self._running) * self._progress

    def _made(self, sequence: Response) -> float:
        if sequence.entered is None:
            return sequence.made
        return min(sequence.made + self._progress - sequence.entered, sequence.length)

    def _enter(self, sequence: Response) -> None:
        """Run a waiting sequence. The prompt is read once a request (prefix cache); what a preempted one had
        made is read again.
        """
        request = sequence.request
        read = sequence.made + (0 if request.is_read and not sequence.made else request.prompt_tokens)
        request.is_read = True
        self._read += read
        self._reading_s += read / self.profile.prefill_tokens_per_second
        sequence.entered, sequence.entry = self._progress, sequence.entry + 1
        self._cached += request.prompt_tokens + sequence.made - self._progress
        self._running[sequence] = None
        mark = self._progress + sequence.length - sequence.made
        heapq.heappush(self._marks, (mark, next(self._numbers), sequence, sequence.entry))

    def _leave(self, sequence: Response) -> None:
        """Take a sequence out, with what it has made."""
        made, entered = self._made(sequence), sequence.entered
        assert entered is not None
        self._cached -= sequence.request.prompt_tokens + sequence.made - entered
        sequence.made, sequence.entered = made, None
        del self._running[sequence]
        if not self._running:
            self._cached = 0.0  # no rounding is carried on
            self._reading_s = 0.0

    def _plan_soon(self) -> None:
        """Schedule once, after everything else that happens at this moment."""
        if not self._is_planned:
            self._is_planned = True
            asyncio.get_running_loop().call_soon(self._on_time)

    def _on_time(self) -> None:
        with self.meter:
            self._is_planned = False
            self._advance()
            if self._works():
                self._end_finished()
                self._preempt()
                self._let_in()
            self._draw_level()
            self._set_timer()

    def _works(self) -> bool:
        return self.is_up and not (self.is_stalled or self.is_paused or self.is_asleep)

    def _end_finished(self) -> None:
        while self._marks:
            mark, _, sequence, entry = self._marks[0]
            if sequence.entered is not None and sequence.entry == entry:
                if mark > self._progress + CLOSE:
                    break
                self._leave(sequence)
                sequence.made = sequence.length
                sequence.runs = self._runs(sequence)
                sequence.request.missing -= 1
                asyncio.get_running_loop().call_soon(sequence.request.ended, sequence)
                if not sequence.request.missing:
                    self._requests.pop(sequence.request)
                    if not sequence.request.done.done():
                        sequence.request.done.set_result(None)
            heapq.heappop(self._marks)

    def _preempt(self) -> None:
        """A full cache sends the youngest sequences back to the head of the queue, as vLLM does."""
        while len(self._running) > 1 and self._used() + CLOSE >= self.profile.kv_tokens:
            sequence = next(reversed(self._running))
            self._leave(sequence)
            self._waiting.appendleft(sequence)
            self.preemptions += 1

    def _let_in(self) -> None:
        room = self.profile.kv_tokens * (1 - HEADROOM)
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            need = sequence.request.prompt_tokens + sequence.made
            if self._running and self._used() + need > room:
                break
            self._waiting.popleft()
            self._enter(sequence)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._running:
            self._marks.clear()
        if not self._running or not self._works():
            return
        more = self._marks[0][0] - self._progress
        if len(self._running) > 1:
            more = min(more, (self.profile.kv_tokens - self._used()) / len(self._running))
        seconds = self._reading_s + max(more, 0.0) / self._rate()
        self._timer = asyncio.get_running_loop().call_at(self._at + seconds, self._on_time)

    def _draw_level(self) -> None:
        steps = len(self._running) * GANTT_LEVELS / self._max_running
        level = 0 if not self._running or not self._works() else 1 + int(steps)
        if level != self._level:
            self._level = level
            self.levels.append((self._at, len(self._running) if level else 0))

    # --- ends

    def _declare_stalled_later(self) -> None:
        if self._watch is None and self._requests and not (self.is_paused or self.is_asleep):
            loop = asyncio.get_running_loop()
            self._watch = loop.call_later(self._stalled_after_s, self._declare_stalled)

    def _declare_stalled(self) -> None:
        self._watch = None
        if self.is_stalled:
            error = EngineStalled(
                f"simulated engine {self.index} made no token in {self._stalled_after_s:g} s"
            )
            self.end_requests(error)

    def end_requests(self, error: Exception) -> None:
        for request in list(self._requests):
            if not request.done.done():
                request.done.set_exception(error)
                request.done.exception()  # seen, should nobody wait for it
