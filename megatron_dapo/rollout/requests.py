"""The requests of the prompts that run: started, waited for, cancelled."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from megatron_dapo.rollout.slots import Slot
from megatron_dapo.types import Group, Partial, Prompt

# The group of a prompt; the beginnings of its responses, where there are any, are gone on from.
SampleGroup = Callable[[Prompt, Sequence[Partial]], Awaitable[Group]]


@dataclass(slots=True)
class Requests:
    """The tasks of slots. A request that ends costs constant time, however many run."""

    number: int = 0  # that run, or have ended and were not taken
    _ended: deque[Slot] = field(default_factory=deque)  # and were not taken
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self, slot: Slot, sample: SampleGroup) -> None:
        """Begin the request of a slot that has none."""

        def ended(task: asyncio.Future[Group]) -> None:
            if slot.task is task:
                self._ended.append(slot)
                self._wake.set()

        slot.task = asyncio.ensure_future(sample(slot.prompt, slot.began))
        slot.task.add_done_callback(ended)
        self.number += 1

    def wake(self) -> None:
        """End the `change` that waits."""
        self._wake.set()

    async def change(self) -> None:
        """Wait until another request has ended, or `wake` is called; to be called when all are taken."""
        self._wake.clear()
        await self._wake.wait()

    async def ends(self, number: int) -> None:
        """Wait until so many requests have ended and were not taken."""
        while len(self._ended) < number:
            self._wake.clear()
            await self._wake.wait()

    def take(self) -> list[tuple[Slot, Group | BaseException]]:
        """The requests that have ended since the last call: their groups, or why there is none."""
        taken = [(slot, self._result(slot)) for slot in self._ended]
        self._ended.clear()
        return taken

    async def cancel(self, slots: Iterable[Slot]) -> list[tuple[Slot, Group]]:
        """Cancel the requests of these slots and wait for their end; the groups of those that have ended."""
        groups, tasks = [], []
        for slot in slots:
            if slot.task is None:
                continue
            if slot.task.done():
                if not isinstance(result := self._result(slot), BaseException):
                    groups.append((slot, result))
            else:
                tasks.append(slot.task)
                slot.task = None
                self.number -= 1
        self._ended = deque(slot for slot in self._ended if slot.task is not None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return groups

    def _result(self, slot: Slot) -> Group | BaseException:
        task, slot.task = slot.task, None
        assert task is not None
        self.number -= 1
        if task.cancelled():
            return asyncio.CancelledError()
        return task.exception() or task.result()
