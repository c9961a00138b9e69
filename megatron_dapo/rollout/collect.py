"""Dynamic sampling: the batch is the first K informative groups of the prompt stream, in its order, as if
prompts were sampled one after another (docs/rollouts.md).

Requests run ahead of need, and finish in any order. What lies behind the K-th accepted group is treated
alike, whatever its verdict and whether it has finished, so that being short or easy gains nothing:

- `sampling.max_age=0` (strict): all of it is put back, and sampled anew by the next policy.
- `sampling.max_age>=1` (aged): all of it stays at its place in the stream. Finished groups are kept, running
  requests go on, and a later step consumes them.

With `rollout.seeded` requests go out in rounds, and each round is waited for: nothing depends on timing.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_dapo.batching.filtering import Window, widened
from megatron_dapo.config import SamplingConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.need import PassRate, prompts_needed, running_needed
from megatron_dapo.types import Collected, Group, Prompt

SampleGroup = Callable[[Prompt], Awaitable[Group]]


class Prompts(Protocol):
    def next(self) -> Prompt | None: ...


class SamplingCapReached(UserError):
    """Too few informative groups within sampling.max_prompts."""


@dataclass(slots=True, eq=False)
class _Slot:
    """One prompt at its place in the stream: it waits (not admitted), runs (has a task) or has its group.

    reported: a step before this one has counted its group as sampled.
    """

    prompt: Prompt
    admitted: bool = False
    task: asyncio.Future[Group] | None = None
    group: Group | None = None
    reported: bool = False


@dataclass(slots=True)
class Collector:
    """Collects steps one after another; its state (`state`, `load_state`) survives a restart of the run.

    run_ahead: informative groups of later steps to have under way as well; `sampling.max_age` bounds them.
    A completion costs amortized constant time: `_slots` is in stream order, and two indices move through it.
    """

    prompts: Prompts
    sample: SampleGroup
    config: SamplingConfig
    one_round_at_a_time: bool = False
    progress: Callable[[int, int], None] = lambda done, total: None
    run_ahead: int = 0
    _slots: list[_Slot] = field(default_factory=list)  # not consumed yet, in stream order, no gaps
    _pass_rate: PassRate = field(default_factory=PassRate)  # of the steps before
    _version: int = -1  # of the newest step that was begun
    _opened_with: dict[str, Any] | None = None  # `state` at the beginning of a step that is not finished
    _exhausted: bool = False
    _cut_off: bool = False  # requests were given up between two steps
    # Of the running step:
    _counts: Counter[str] = field(default_factory=Counter)
    _window: Window = field(default_factory=Window)
    _accepted: list[Group] = field(default_factory=list)  # of _slots[:_known]
    _known: int = 0  # _slots[:_known] have finished and were judged, up to the K-th accepted
    _next: int = 0  # _slots[:_next] are admitted
    _last: int = 0  # no slot from here on is admitted
    _launched: int = 0
    _most_running: int = 0
    _informative: int = 0  # finished slots in the configured window, wherever they are
    _finished: int = 0
    # Requests:
    _running: int = 0
    _again: list[_Slot] = field(default_factory=list)  # admitted, and given up by a failure
    _done: deque[_Slot] = field(default_factory=deque)  # their tasks have ended, and were not looked at
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def collect(self, weight_version: int) -> Collected:
        """Sample until K informative groups are known in order, or the cap or the end of the data.

        May be called again after an exception of the sampler or a cancellation: finished groups are kept, the
        rest is sampled anew. SamplingCapReached when on_cap is 'error'.
        """
        if self._opened_with is None:
            self._open_step(weight_version)
        try:
            while True:
                self._take_finished()
                self._advance()
                self.progress(len(self._accepted), self.config.prompts_per_step)
                if len(self._accepted) == self.config.prompts_per_step:
                    break
                self._launch()
                if self._running:
                    await self._wait()
                elif self.config.adaptive and (wider := widened(self._window)):
                    self._window, self._known, self._accepted = wider, 0, []
                else:
                    self._check_cap()
                    break
            if self.config.max_age == 0:
                await self._abort(self._slots[self._known :])
        except BaseException:
            await self.stop()
            raise
        return self._close_step()

    async def stop(self) -> None:
        """Give up the requests that run; finished groups stay. The next `collect` makes them again."""
        self._again = await self._abort(self._slots)
        self._cut_off = self._opened_with is None and bool(self._again)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: kept groups, prompts to sample again, the verdicts of recent steps.

        A step that was begun and given up counts as not begun. Between two steps, requests that began after
        the last weight push may be running: their prompts are sampled again, and so are those of them that
        have finished, for the short ones finish first. For the same reason nothing is kept when requests were
        given up between two steps.
        """
        if self._opened_with is not None:
            kept, rate = self._opened_with["carried"], self._opened_with["verdicts"]
        else:
            groups = [slot.group for slot in self._slots if slot.group is not None]
            kept = [group for group in groups if group.weight_version <= self._version and not self._cut_off]
            rate = self._pass_rate.informative, self._pass_rate.finished
        positions = {group.prompt.position for group in kept}
        waiting = [slot.prompt for slot in self._slots if slot.prompt.position not in positions]
        return {"carried": kept, "waiting": waiting, "verdicts": rate}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`; nothing may be running. UserError for that of an earlier version."""
        if "verdicts" not in state:
            raise UserError(
                "checkpoint.resume: this checkpoint was written by an earlier version, which collects "
                "by another rule; start a new run with another run.dir, or go on with that version"
            )
        kept = [_Slot(group.prompt, admitted=True, group=group, reported=True) for group in state["carried"]]
        slots = [*kept, *(_Slot(prompt) for prompt in state["waiting"])]
        self._slots = sorted(slots, key=lambda slot: slot.prompt.position)
        self._pass_rate = PassRate(*state["verdicts"])
        self._version = max((group.weight_version for group in state["carried"]), default=-1)
        self._opened_with, self._again, self._cut_off = None, [], False

    def _open_step(self, weight_version: int) -> None:
        self._opened_with = self.state()
        self._version, self._cut_off = weight_version, False
        self._window = Window(low=self.config.low, high=self.config.high, inclusive=self.config.inclusive)
        self._counts, self._accepted = Counter(), []
        self._known = self._next = self._last = self._launched = self._informative = self._finished = 0
        self._most_running = prompts_needed(self.config.prompts_per_step + self._ahead, self._rate())
        for index, slot in enumerate(self._slots, start=1):
            if slot.admitted:
                self._last = index
            if slot.group is not None:
                self._counts["carried"] += slot.reported
                self._count_verdict(slot.group)

    def _verdict(self, group: Group) -> str:
        return self._window.judge(group.accuracy) if self.config.dynamic else "accepted"

    def _count_verdict(self, group: Group) -> None:
        self._finished += 1
        self._informative += self._verdict(group) == "accepted"

    def _advance(self) -> None:
        """Judge the finished beginning of the stream, up to the K-th accepted group."""
        while self._known < len(self._slots) and len(self._accepted) < self.config.prompts_per_step:
            group = self._slots[self._known].group
            if group is None:
                break
            if self._verdict(group) == "accepted":
                self._accepted.append(group)
            self._known += 1

    # --- need

    @property
    def _ahead(self) -> int:
        """Admission by age: what is launched now is consumed at most max_age steps after this one."""
        return min(self.run_ahead, self.config.max_age * self.config.prompts_per_step)

    def _rate(self) -> float:
        """The pass rate to launch by: of earlier steps, and of what is known of this one in stream order.
        (What has finished behind that is no fair sample: short groups finish first.)
        """
        if not self.config.dynamic:
            return 1.0
        return self._pass_rate.optimistic(len(self._accepted), self._known)

    def _wanted(self) -> int:
        """Prompts to launch now, beyond those that run."""
        goal, rate = self.config.prompts_per_step + self._ahead, self._rate()
        behind = self._finished - self._known  # finished, behind a prompt that has not
        running = running_needed(
            goal=goal,
            rate=rate,
            accepted=len(self._accepted),
            informative=self._informative,
            behind=behind,
            running=self._running,
        )
        running = min(running, self._most_running)
        if self.config.max_age and self.config.dynamic:
            within = (1 + self.config.max_age) * self.config.prompts_per_step - self._informative
            running = min(running, int(within / self._pass_rate.mean(len(self._accepted), self._known)))
        return running - self._running

    # --- requests

    def _launch(self) -> None:
        """Start what is needed: first what a failure gave up, then the stream in its order.

        Prompts that wait before an admitted one are needed whatever the estimate says.
        """
        if self.one_round_at_a_time and self._running:
            return
        again, self._again = self._again, []
        for slot in again:
            self._start(slot)
        if again and self.one_round_at_a_time:
            return
        wanted = self._wanted()
        while self._launched < self.config.prompt_cap:
            while self._next < len(self._slots) and self._slots[self._next].admitted:
                self._next += 1
            if wanted <= 0 and self._next >= self._last:
                return
            if self._next == len(self._slots):
                prompt = self.prompts.next()
                if prompt is None:
                    self._exhausted = True
                    return
                self._slots.append(_Slot(prompt))
            slot = self._slots[self._next]
            slot.admitted = True
            self._last = max(self._last, self._next + 1)
            self._launched += 1
            wanted -= 1
            self._start(slot)

    def _start(self, slot: _Slot) -> None:
        def ended(task: asyncio.Future[Group]) -> None:
            if slot.task is task:
                self._done.append(slot)
                self._wake.set()

        slot.task = asyncio.ensure_future(self.sample(slot.prompt))
        slot.task.add_done_callback(ended)
        self._running += 1

    async def _wait(self) -> None:
        """Until a request has ended; in rounds, until all have."""
        while len(self._done) < (self._running if self.one_round_at_a_time else 1):
            self._wake.clear()
            await self._wake.wait()

    def _take_finished(self) -> None:
        """Put the groups of ended requests into their slots; raises the first failure among them."""
        failed: BaseException | None = None
        while self._done:
            error = self._take(self._done.popleft())
            failed = failed or error
        if failed is not None:
            raise failed

    def _take(self, slot: _Slot) -> BaseException | None:
        """Put the group of an ended request into its slot, or return why there is none."""
        task, slot.task = slot.task, None
        assert task is not None
        self._running -= 1
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            slot.group = task.result()
            self._count_verdict(slot.group)
        return error

    async def _abort(self, slots: Sequence[_Slot]) -> list[_Slot]:
        """Cancel the requests of these slots (the engine drops them), but take those that have ended; the
        admitted slots that have no group.
        """
        tasks = []
        for slot in slots:
            if slot.task is None:
                continue
            if slot.task.done():
                self._take(slot)
            else:
                tasks.append(slot.task)
                slot.task = None
                self._running -= 1
        self._done = deque(slot for slot in self._done if slot.task is not None)
        without = [slot for slot in slots if slot.admitted and slot.group is None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return without

    # --- the end of a step

    def _check_cap(self) -> None:
        accepted = len(self._accepted)
        if self._exhausted or (accepted and self.config.on_cap == "train_smaller_batch"):
            return
        finished = Counter(Window().judge(slot.group.accuracy) for slot in self._slots if slot.group)
        raise SamplingCapReached(
            f"only {accepted} of sampling.prompts_per_step={self.config.prompts_per_step} groups are "
            f"informative after "
            f"sampling.max_prompts={self.config.prompt_cap} prompts ({finished['all_correct']} all correct, "
            f"{finished['all_wrong']} all "
            "wrong); use other data, raise sampling.max_prompts, or set sampling.on_cap=train_smaller_batch"
        )

    def _close_step(self) -> Collected:
        """Take the slots up to the K-th accepted group out of the stream, count every group by reason, and
        treat all that is behind alike.
        """
        consumed, behind = self._slots[: self._known], self._slots[self._known :]
        sampled = tuple(slot.group for slot in self._slots if slot.group and not slot.reported)
        counts, configured = self._counts, 0
        counts["groups_sampled"] = len(sampled)
        base = Window(low=self.config.low, high=self.config.high, inclusive=self.config.inclusive)
        for slot in consumed:
            assert slot.group is not None
            verdict = self._verdict(slot.group)
            counts["groups_accepted" if verdict == "accepted" else verdict] += 1
            configured += base.judge(slot.group.accuracy) == "accepted"
        ages = [self._version - group.weight_version for group in self._accepted]
        counts["overdue"] = sum(age > self.config.max_age for age in ages)
        for slot in behind:
            if not slot.admitted:
                continue
            if self.config.max_age == 0:
                counts["aborted" if slot.group is None else "surplus_dropped"] += 1
                slot.admitted, slot.group = False, None
            else:
                counts["left_running" if slot.group is None else "carried_over"] += 1
                slot.reported = slot.group is not None
        self._pass_rate.end_step(configured, len(consumed))
        self._slots, self._opened_with = behind, None
        self._again = [slot for slot in self._again if slot.admitted and slot.task is None]
        return Collected(
            groups=tuple(self._accepted),
            sampled=sampled,
            counts=dict(counts),
            exhausted=self._exhausted and not behind,
        )
