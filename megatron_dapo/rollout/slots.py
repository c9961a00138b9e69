"""One prompt at its place in the stream, and how a checkpoint keeps it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_dapo.types import Group, GroupFacts, Partial, Prompt


@dataclass(slots=True)
class Slot:
    """A prompt that no step has consumed yet: it waits (not admitted), runs (has a task) or has its result.

    result: its group, or only the facts of a group that no step can train on. began: the beginnings of its
    responses that its next request goes on from. reported: a step before this one has counted its result.
    """

    prompt: Prompt
    admitted: bool = False
    task: asyncio.Future[Group] | None = field(default=None, compare=False)
    result: Group | GroupFacts | None = None
    began: Sequence[Partial] = ()
    reported: bool = False

    def put_back(self) -> None:
        """It is sampled anew, by the policy of its time."""
        self.admitted, self.result, self.began, self.reported = False, None, (), False


def saved(
    slots: Sequence[Slot],
    beginnings: Mapping[int, Sequence[Partial]],
    lost: Collection[str] | None,
) -> list[Slot]:
    """Copies for a checkpoint: those that run have their beginnings, by the prompt's position, to go on from.

    `lost`: engines that did not tell the beginnings of their requests; None: of no engine. Their requests
    will be made again; so are the groups that they have finished behind the last step, for these are the
    short ones of what they were given.
    """
    copies = []
    for slot in slots:
        copy = dataclasses.replace(slot, task=None)
        if (began := beginnings.get(slot.prompt.position)) is not None:
            copy.result, copy.reported = None, False
            copy.began = began if any(len(partial.tokens) for partial in began) else ()
        elif slot.result is None and slot.task is not None and _succeeded(slot.task):
            copy.result = slot.task.result()
        if copy.result is not None and _is_of(copy.result, lost):
            copy.put_back()
        copies.append(copy)
    return copies


def _succeeded(task: asyncio.Future[Group]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _is_of(result: Group | GroupFacts, lost: Collection[str] | None) -> bool:
    """Whether one of these engines made it, as far as is known."""
    if lost is None:
        return True
    return bool(lost) and (result.timing is None or result.timing.engine in lost)
