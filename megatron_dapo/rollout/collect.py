"""Dynamic sampling: the batch is the first K informative groups of the prompt stream, in its order, as if
prompts were sampled one after another (docs/rollouts.md).

Requests run ahead of need, and finish in any order. What lies behind the K-th accepted group is treated
alike, whatever its verdict and whether it has finished, so that being short or easy gains nothing:

- `sampling.max_age=0` (strict): all of it is put back, and sampled anew by the next policy.
- `sampling.max_age>=1` (aged): all of it stays at its place in the stream. Finished groups are kept, running
  requests go on, and a later step consumes them. Sampling goes on between two steps.

With `rollout.seeded` requests go out in rounds, and each round is waited for: nothing depends on timing, and
nothing runs between two steps.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_dapo.batching.filtering import Window
from megatron_dapo.config import SamplingConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.group_filter import GroupFilter
from megatron_dapo.rollout.need import PassRate, prompts_needed, running_needed
from megatron_dapo.rollout.requests import Requests, SampleGroup
from megatron_dapo.rollout.slots import Slot, saved
from megatron_dapo.types import Collected, Group, GroupFacts, Partial, Prompt


class Prompts(Protocol):
    def next(self) -> Prompt | None: ...

    def record(self, prompt: Prompt, accuracy: float) -> None:
        """A step has consumed the prompt's group; called once for each, in stream order."""
        ...


class SamplingCapReached(UserError):
    """Too few informative groups within sampling.max_prompts."""


@dataclass(slots=True)
class Collector:
    """Collects steps one after another; its state (`state`, `load_state`) survives a restart of the run.

    run_ahead: informative groups of later steps to have under way as well; None: as many as
    `sampling.max_age` allows. A completion costs amortized constant time: `_slots` is in stream order, and
    two indices move through it.
    """

    prompts: Prompts
    sample: SampleGroup
    config: SamplingConfig
    one_round_at_a_time: bool = False
    progress: Callable[[int, int], None] = lambda done, total: None
    run_ahead: int | None = None
    _slots: list[Slot] = field(default_factory=list)  # not consumed yet, in stream order, no gaps
    _pass_rate: PassRate = field(default_factory=PassRate)  # of the steps before
    _filter: GroupFilter = field(init=False)
    _step: int = 0  # the step that is collected now, or next: the weight version that it trains
    _weights: int = 0  # version that requests are sampled by from now on
    _opened_with: tuple[list[Slot], tuple[float, float]] | None = None  # slots and verdicts, see `state`
    _cut_off: bool = False  # requests were given up between two steps
    _exhausted: bool = False
    # Of the step:
    _begun: bool = False
    _counts: Counter[str] = field(default_factory=Counter)
    _accepted: list[Group] = field(default_factory=list)  # of _slots[:_known]
    _known: int = 0  # _slots[:_known] have finished and were judged, up to the K-th accepted
    _next: int = 0  # _slots[:_next] are admitted
    _last: int = 0  # no slot from here on is admitted
    _launched: int = 0
    _most_running: int = 0
    _informative: int = 0  # finished slots in the configured window, wherever they are
    _finished: int = 0
    # Requests:
    _requests: Requests = field(default_factory=Requests)
    _again: list[Slot] = field(default_factory=list)  # admitted, and given up by a failure
    _between: asyncio.Task[None] | None = None  # samples on between two steps

    def __post_init__(self) -> None:
        self._filter = GroupFilter(self.config)

    @property
    def is_continuous(self) -> bool:
        """Whether requests run between two steps, so that `state` has to be told their beginnings."""
        return self.config.max_age > 0 and not self.one_round_at_a_time

    async def collect(self, weight_version: int) -> Collected:
        """Sample until K informative groups are known in order, or the cap or the end of the data.

        May be called again after an exception of the sampler or a cancellation: finished groups are kept, the
        rest is sampled anew (aged, a cancellation leaves it running). What failed since the step before is
        raised here. SamplingCapReached when on_cap is 'error'.
        """
        await self._stop_between()
        self._open(weight_version)
        try:
            while True:
                self._take_finished()
                self._advance()
                self.progress(len(self._accepted), self.config.prompts_per_step)
                if len(self._accepted) == self.config.prompts_per_step:
                    break
                self._launch()
                if running := self._requests.number:
                    await self._requests.ends(running if self.one_round_at_a_time else 1)
                elif self._filter.widen():
                    self._known, self._accepted = 0, []
                else:
                    self._check_cap()
                    break
            if self.config.max_age == 0:
                await self._abort(self._slots[self._known :])
        except BaseException as error:
            if not (self.is_continuous and isinstance(error, asyncio.CancelledError)):
                await self.stop()
            raise
        collected = self._close_step()
        if self.is_continuous:
            self._begin()
            self._between = asyncio.ensure_future(self._sample_on())
        return collected

    def weights_changed(self, version: int) -> None:
        """From now on requests are sampled by this version, and another step may be sampled for."""
        self._weights = version
        self._requests.wake()

    async def stop(self) -> None:
        """Give up the requests that run; finished groups stay. The next `collect` makes them again."""
        if self._between is not None:
            self._between.cancel()
            await asyncio.gather(self._between, return_exceptions=True)
        self._between = None
        self._again = await self._abort(self._slots)
        self._cut_off = self._opened_with is None and bool(self._again)

    def state(
        self, beginnings: Mapping[int, Sequence[Partial]] | None = None, lost: Collection[str] = ()
    ) -> dict[str, Any]:
        """What a checkpoint needs: the slots, the verdicts of recent steps, the level of the window.

        Continuous, the requests that run have `beginnings`, by the prompt's position; `lost` are the engines
        that did not tell them (slots.py). Nothing finished is kept when requests were given up between two
        steps. Otherwise a step that was begun and given up counts as not begun.
        """
        if self._opened_with is not None:
            slots, verdicts = self._opened_with
            slots = slots + [Slot(s.prompt) for s in self._slots[len(slots) :]]
        else:
            slots = saved(self._slots, beginnings or {}, None if self._cut_off else lost)
            verdicts = self._pass_rate.informative, self._pass_rate.finished
        return {"slots": slots, "verdicts": verdicts, "window": self._filter.level}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`; nothing may be running. Strict, what an aged run had kept is put back."""
        self._slots = saved(state["slots"], {}, ())
        for slot in self._slots:
            if self.config.max_age == 0:
                slot.put_back()
            if isinstance(slot.result, Group):
                slot.result = self._filter.kept_of(slot.result)
        self._again = [slot for slot in self._slots if slot.admitted and slot.result is None]
        self._pass_rate, self._filter.level = PassRate(*state["verdicts"]), state["window"]
        self._opened_with, self._cut_off, self._begun = None, False, False

    def _open(self, weight_version: int) -> None:
        self._step = self._weights = weight_version
        self._cut_off = False
        if not self._begun:
            if not self.is_continuous:
                state = self.state()
                self._opened_with = state["slots"], state["verdicts"]
            self._begin()

    def _begin(self) -> None:
        """The counts of a step begin: when it is opened, or continuous, when the step before is closed."""
        self._begun = True
        self._filter.begin_step()
        self._counts, self._accepted = Counter(), []
        self._known = self._next = self._last = self._launched = self._informative = self._finished = 0
        self._most_running = prompts_needed(self.config.prompts_per_step + self._ahead, self._rate())
        for index, slot in enumerate(self._slots, start=1):
            if slot.admitted:
                self._last = index
            if slot.result is not None:
                self._counts["carried"] += slot.reported
                self._count_verdict(slot.result)

    async def _sample_on(self) -> None:
        """Between two steps: take what has finished and launch what the next step can be sampled for."""
        while True:
            self._take_finished()
            self._advance()
            self._launch()
            await self._requests.change()

    async def _stop_between(self) -> None:
        """End `_sample_on`; raises what it has met."""
        task, self._between = self._between, None
        if task is None:
            return
        if task.done():
            await self.stop()
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def _count_verdict(self, result: Group | GroupFacts) -> None:
        self._finished += 1
        self._informative += self._filter.verdict(result) == "accepted"

    def _advance(self) -> None:
        """Judge the finished beginning of the stream, up to the K-th accepted group."""
        while self._known < len(self._slots) and len(self._accepted) < self.config.prompts_per_step:
            result = self._slots[self._known].result
            if result is None:
                break
            if self._filter.verdict(result) == "accepted":
                assert isinstance(result, Group)
                self._accepted.append(result)
            self._known += 1

    # --- need

    @property
    def _ahead(self) -> int:
        """Informative groups to have under way beyond those of one step."""
        if not self.is_continuous:
            return 0
        within = self.config.max_age * self.config.prompts_per_step
        return within if self.run_ahead is None else min(self.run_ahead, within)

    def _rate(self) -> float:
        """The pass rate to launch by: of earlier steps, and of what is known of this one in stream order.
        (What has finished behind that is no fair sample: short groups finish first.)
        """
        if not self.config.dynamic:
            return 1.0
        return self._pass_rate.optimistic(len(self._accepted), self._known)

    def _wanted(self) -> int:
        """Prompts to launch now, beyond those that run.

        Admission by age: what is launched now is consumed at most max_age steps after the step that its
        weights are the newest for. Between two steps, before the push, that is one step less.
        """
        steps = self._weights - self._step + 1  # of the step and those before it that the weights are for
        goal, rate = max(0, steps) * self.config.prompts_per_step + self._ahead, self._rate()
        behind = self._finished - self._known  # finished, behind a prompt that has not
        running = running_needed(
            goal=goal,
            rate=rate,
            accepted=len(self._accepted),
            informative=self._informative,
            behind=behind,
            running=self._requests.number,
        )
        running = min(running, self._most_running)
        if self.config.max_age and self.config.dynamic:
            within = (steps + self.config.max_age) * self.config.prompts_per_step - self._informative
            running = min(running, int(within / self._pass_rate.mean(len(self._accepted), self._known)))
        return running - self._requests.number

    # --- requests

    def _launch(self) -> None:
        """Start what is needed: first what a failure gave up, then the stream in its order.

        Prompts that wait before an admitted one are needed whatever the estimate says.
        """
        if self.one_round_at_a_time and self._requests.number:
            return
        again, self._again = self._again, []
        for slot in again:
            self._requests.start(slot, self.sample)
        if again and self.one_round_at_a_time:
            return
        wanted = self._wanted()
        while self._launched < self.config.prompt_cap:
            while self._next < len(self._slots) and self._slots[self._next].admitted:
                self._next += 1
            if wanted <= 0 and self._next >= self._last:
                return
            if self._next == len(self._slots):
                if len(self._slots) >= self.config.most_ahead:
                    return
                prompt = self.prompts.next()
                if prompt is None:
                    self._exhausted = True
                    return
                self._slots.append(Slot(prompt))
            slot = self._slots[self._next]
            slot.admitted = True
            self._last = max(self._last, self._next + 1)
            self._launched += 1
            wanted -= 1
            self._requests.start(slot, self.sample)

    def _take_finished(self) -> None:
        """Put the groups of ended requests into their slots; raises the first failure among them."""
        failed: BaseException | None = None
        for slot, result in self._requests.take():
            if isinstance(result, BaseException):
                failed = failed or result
            else:
                self._fill(slot, result)
        if failed is not None:
            raise failed

    def _fill(self, slot: Slot, group: Group) -> None:
        slot.result, slot.began = self._filter.kept_of(group), ()
        self._count_verdict(slot.result)

    async def _abort(self, slots: Sequence[Slot]) -> list[Slot]:
        """Cancel the requests of these slots (the engine drops them), but take those that have ended; the
        admitted slots that have no group.
        """
        for slot, group in await self._requests.cancel(slots):
            self._fill(slot, group)
        return [slot for slot in slots if slot.admitted and slot.result is None]

    # --- the end of a step

    def _check_cap(self) -> None:
        accepted = len(self._accepted)
        if self._exhausted or (accepted and self.config.on_cap == "train_smaller_batch"):
            return
        finished = Counter(Window().judge(slot.result.accuracy) for slot in self._slots if slot.result)
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
        sampled = tuple(
            GroupFacts.of(slot.result, self._filter.verdict(slot.result))
            if isinstance(slot.result, Group)
            else slot.result
            for slot in self._slots
            if slot.result is not None and not slot.reported
        )
        counts, window = self._counts, self._filter.window
        counts["groups_sampled"] = len(sampled)
        for slot in consumed:
            assert slot.result is not None
            verdict = self._filter.verdict(slot.result)
            counts["groups_accepted" if verdict == "accepted" else verdict] += 1
            self.prompts.record(slot.prompt, slot.result.accuracy)
        ages = [self._step - group.weight_version for group in self._accepted]
        counts["overdue"] = sum(age > self.config.max_age for age in ages)
        for slot in behind:
            if not slot.admitted:
                continue
            if self.config.max_age == 0:
                counts["aborted" if slot.result is None else "surplus_dropped"] += 1
                slot.put_back()
            else:
                counts["left_running" if slot.result is None else "carried_over"] += 1
                slot.reported = slot.result is not None
        informative = self._filter.end_step([slot.result for slot in consumed if slot.result is not None])
        self._pass_rate.end_step(informative, len(consumed))
        collected = Collected(
            groups=tuple(self._accepted),
            sampled=sampled,
            counts=dict(counts),
            window=(window.low, window.high),
            exhausted=self._exhausted and not behind,
        )
        self._slots, self._opened_with, self._begun = behind, None, False
        self._accepted, self._step = [], self._step + 1
        self._again = [slot for slot in self._again if slot.admitted and slot.task is None]
        return collected
