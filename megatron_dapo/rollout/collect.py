"""Dynamic sampling: the batch is the first K informative groups of the prompt stream, whatever order they
finish in.

Requests run ahead of need, by the running pass rate. When the K-th informative group is known, later work in
flight is aborted and its prompts go back to the front of the stream; finished informative groups beyond K are
carried to the next step. With `rollout.seeded` requests go out in rounds, and each round is waited for, so
that nothing depends on timing.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_dapo.batching.filtering import Window, widened
from megatron_dapo.config import SamplingConfig
from megatron_dapo.errors import UserError
from megatron_dapo.types import Collected, Group, Prompt

SampleGroup = Callable[[Prompt], Awaitable[Group]]
START_PASS_RATE = 1.0
PASS_RATE_MEMORY = 0.9  # weight of the past in the running pass rate


class Prompts(Protocol):
    def next(self) -> Prompt | None: ...


class SamplingCapReached(UserError):
    """Too few informative groups within sampling.max_prompts."""


@dataclass(slots=True)
class _Slot:
    """One prompt of this step, in stream order."""

    prompt: Prompt
    task: asyncio.Task[Group] | None = None
    group: Group | None = None
    carried: bool = False


@dataclass(slots=True)
class Collector:
    """Collects steps one after another; its state (`state`, `load_state`) survives a restart of the run."""

    prompts: Prompts
    sample: SampleGroup
    config: SamplingConfig
    one_round_at_a_time: bool = False
    progress: Callable[[int, int], None] = lambda done, total: None
    _slots: list[_Slot] = field(default_factory=list)
    _waiting: deque[Prompt] = field(default_factory=deque)
    _carried: list[Group] = field(default_factory=list)
    _opened_with: dict[str, Any] | None = None  # `state` at the beginning of a step that is not finished
    _pass_rate: float = START_PASS_RATE  # at the beginning of the step
    _counts: Counter[str] = field(default_factory=Counter)
    _launched: int = 0
    _exhausted: bool = False

    async def collect(self, weight_version: int) -> Collected:
        """Sample until K informative groups are known in order, or the cap or the end of the data.

        May be called again after an exception of the sampler or a cancellation: finished groups are kept, the
        rest is sampled anew. SamplingCapReached when on_cap is 'error'.
        """
        if self._opened_with is None:
            self._open_step(weight_version)
        window = self._window
        try:
            while True:
                accepted = self._accepted_in_order(window)
                self.progress(len(accepted), self.config.prompts_per_step)
                if len(accepted) == self.config.prompts_per_step:
                    break
                running = [slot for slot in self._slots if slot.group is None]
                if not running or not self.one_round_at_a_time:
                    running += self._launch(window)
                if not running:
                    if self.config.adaptive and (wider := widened(window)):
                        window = wider
                        continue
                    self._check_cap(len(accepted))
                    break
                await self._wait(running)
        except BaseException:
            self._take_finished(self._slots)
            await self._abort([slot for slot in self._slots if slot.task])
            raise
        return await self._close_step(accepted, window)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: carried groups, prompts to sample again, the pass rate.

        A step that was begun and given up counts as not begun: all its prompts are sampled again.
        """
        if self._opened_with is None:
            return {
                "carried": list(self._carried),
                "waiting": list(self._waiting),
                "pass_rate": self._pass_rate,
            }
        carried = {group.prompt.position for group in self._opened_with["carried"]}
        prompts = [*(slot.prompt for slot in self._slots), *self._waiting]
        waiting = [prompt for prompt in prompts if prompt.position not in carried]
        return self._opened_with | {"waiting": sorted(waiting, key=lambda prompt: prompt.position)}

    def load_state(self, state: dict[str, Any]) -> None:
        self._carried, self._waiting, self._pass_rate = (
            list(state["carried"]),
            deque(state["waiting"]),
            state["pass_rate"],
        )
        self._slots, self._opened_with = [], None

    def _open_step(self, weight_version: int) -> None:
        """Carried groups and prompts that were put back come first, in stream order; groups that are too old
        are sampled anew.
        """
        self._opened_with = self.state()
        self._counts, self._launched = Counter(), 0
        slots = [_Slot(prompt) for prompt in self._waiting]
        for group in self._carried:
            fresh = weight_version - group.weight_version <= self.config.max_age
            self._counts["carried" if fresh else "expired"] += 1
            slots.append(_Slot(group.prompt, group=group if fresh else None, carried=fresh))
        slots.sort(key=lambda slot: slot.prompt.position)
        # Slots without a group are launched by need, like the rest of the stream.
        self._waiting = deque(slot.prompt for slot in slots if slot.group is None)
        self._slots = [slot for slot in slots if slot.group is not None]
        self._carried = []

    def _accepted_in_order(self, window: Window) -> list[_Slot]:
        """The informative groups of the finished beginning of the stream, at most K."""
        first_waiting = self._waiting[0].position if self._waiting else math.inf
        accepted = []
        for slot in self._slots:
            if (
                slot.group is None
                or slot.prompt.position > first_waiting
                or len(accepted) == self.config.prompts_per_step
            ):
                break
            if self._verdict(slot.group, window) == "accepted":
                accepted.append(slot)
        return accepted

    @property
    def _window(self) -> Window:
        return Window(low=self.config.low, high=self.config.high, inclusive=self.config.inclusive)

    def _verdict(self, group: Group, window: Window) -> str:
        return window.judge(group.accuracy) if self.config.dynamic else "accepted"

    def _launch(self, window: Window) -> list[_Slot]:
        """Start as many prompts as the running pass rate says are missing."""
        finished = [slot.group for slot in self._slots if slot.group is not None]
        informative = sum(self._verdict(group, window) == "accepted" for group in finished)
        in_flight = len(self._slots) - len(finished)
        rate = max(self._running_pass_rate(), 1 / self.config.prompts_per_step)
        missing = math.ceil((self.config.prompts_per_step - informative) / rate) - in_flight
        # A carried group counts only when every prompt before it is known.
        missing = max(
            missing,
            sum(prompt.position < self._slots[-1].prompt.position for prompt in self._waiting)
            if self._slots
            else 0,
        )
        launched = []
        for _ in range(min(missing, self.config.prompt_cap - self._launched)):
            prompt = self._waiting.popleft() if self._waiting else self.prompts.next()
            if prompt is None:
                self._exhausted = True
                break
            self._launched += 1
            launched.append(_Slot(prompt))
        # A prompt put back by an earlier step may precede carried groups.
        self._slots = sorted(self._slots + launched, key=lambda slot: slot.prompt.position)
        return launched

    def _running_pass_rate(self) -> float:
        """Over the finished groups in stream order, so that it depends neither on timing nor on failures."""
        rate = self._pass_rate
        for slot in self._slots:
            if slot.group is not None and not slot.carried:
                informative = self._verdict(slot.group, self._window) == "accepted"
                rate = PASS_RATE_MEMORY * rate + (1 - PASS_RATE_MEMORY) * informative
        return rate

    async def _wait(self, running: list[_Slot]) -> None:
        for slot in running:
            if slot.task is None:
                slot.task = asyncio.ensure_future(self.sample(slot.prompt))  # type: ignore[arg-type]
        when = asyncio.ALL_COMPLETED if self.one_round_at_a_time else asyncio.FIRST_COMPLETED
        await asyncio.wait([slot.task for slot in running if slot.task], return_when=when)
        if failed := self._take_finished(running):
            raise failed

    def _take_finished(self, slots: list[_Slot]) -> BaseException | None:
        """Put finished groups into their slots; returns the first failure, whose slots are sampled again."""
        failed: BaseException | None = None
        for slot in slots:
            if slot.task and slot.task.done():
                task, slot.task = slot.task, None
                error = asyncio.CancelledError() if task.cancelled() else task.exception()
                if error is not None:
                    failed = failed or error
                    continue
                slot.group = task.result()
        return failed

    async def _abort(self, slots: list[_Slot]) -> None:
        """Cancel requests (the engine drops them); a slot without a group is sampled again."""
        tasks = [slot.task for slot in slots if slot.task]
        for slot in slots:
            slot.task = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _check_cap(self, accepted: int) -> None:
        if self._exhausted or (accepted and self.config.on_cap == "train_smaller_batch"):
            return
        finished = Counter(self._verdict(slot.group, Window()) for slot in self._slots if slot.group)
        raise SamplingCapReached(
            f"only {accepted} of sampling.prompts_per_step={self.config.prompts_per_step} groups are "
            f"informative after "
            f"sampling.max_prompts={self.config.prompt_cap} prompts ({finished['all_correct']} all correct, "
            f"{finished['all_wrong']} all "
            "wrong); use other data, raise sampling.max_prompts, or set sampling.on_cap=train_smaller_batch"
        )

    async def _close_step(self, accepted: list[_Slot], window: Window) -> Collected:
        """Split everything after the K-th accepted group into carried and aborted, and count every group by
        reason.
        """
        taken = {slot.prompt.position for slot in accepted}
        running = [slot for slot in self._slots if slot.group is None]
        await self._abort(running)
        counts = Counter(self._counts)
        counts["aborted"] = len(running)
        put_back = [slot.prompt for slot in running]
        for slot in self._slots:
            if slot.group is None:
                continue
            verdict = self._verdict(slot.group, window)
            if not slot.carried:
                counts["groups_sampled"] += 1
            if verdict != "accepted":
                counts[verdict] += 1
            elif slot.prompt.position in taken:
                counts["groups_accepted"] += 1
            elif self.config.max_age > 0:
                self._carried.append(slot.group)
                counts["carried_over"] += 1
            else:
                counts["surplus_dropped"] += 1
                put_back.append(slot.prompt)
        self._waiting = deque(sorted([*put_back, *self._waiting], key=lambda prompt: prompt.position))
        self._pass_rate = self._running_pass_rate()
        sampled = tuple(slot.group for slot in self._slots if slot.group and not slot.carried)
        self._slots, self._opened_with = [], None
        return Collected(
            groups=tuple(slot.group for slot in accepted if slot.group),
            sampled=sampled,
            counts=dict(counts),
            exhausted=self._exhausted and not self._waiting and not self._carried,
        )
