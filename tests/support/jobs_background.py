"""What ranks do in tests/test_checkpoint_writer.py: save while training goes on, with disks that are slow,
full or broken.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_dapo.errors import UserError
from support.cases import PolicyRun, plan
from support.jobs_policy import digest, open_policy, part_of
from support.samples import make_samples


@contextlib.contextmanager
def opening(instead: Callable[[str], str]) -> Iterator[None]:
    """Where this rank opens the file of its part of a checkpoint, `instead` says which file that is."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def opened(file: str, mode: str) -> Any:
        return open(instead(file), mode)

    filesystem_async.open = opened  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del filesystem_async.open  # type: ignore[attr-defined]


def saves_beside_training(model: str, layout: str, folder: str) -> dict[str, Any]:
    """What was saved in the background, beside what the policy was then and has become meanwhile."""
    from megatron_dapo import checkpoint

    with open_run(model, layout, folder) as (policy, writer, save):
        update(policy, 0)
        at_save, may_write = digest(policy), threading.Event()

        def wait(file: str) -> str:
            may_write.wait()
            return file

        with opening(wait):
            path = save(1)
            returned_before = not path.exists()
            update(policy, 1)
            writer.poll()
            later, still_writing = digest(policy), not path.exists()
            threading.Timer(0.5, may_write.set).start()
            second = save(2)  # waits for the first
            first_is_complete = path.is_dir()
            writer.finish()
        checkpoint.load(second, policy)
        loaded_second = digest(policy)
        checkpoint.load(path, policy)
        loaded = [digest(policy), loaded_second]
        if policy.session.rank == 0:
            os.truncate(second / "__1_0.distcp", 1000)
        return {
            "cut": _refusal(lambda: checkpoint.load(second, policy)),
            "at_save": at_save,
            "later": later,
            "loaded": loaded,
            "returned_before": returned_before,
            "still_writing": still_writing,
            "first_is_complete": first_is_complete,
        }


def _refusal(load: Callable[[], None]) -> str | None:
    try:
        load()
    except UserError as error:
        return str(error)
    return None


def fails_in_background(model: str, layout: str, folder: str, failing_rank: int) -> dict[str, Any]:
    """Of each kind of error on one rank: the message, and the checkpoints that there are afterwards."""
    from megatron_dapo.checkpoint_writer import SaveFailed

    found: dict[str, Any] = {}
    with open_run(model, layout, folder) as (policy, writer, save):
        save(1)
        writer.finish()
        for step, code in enumerate((errno.ENOSPC, errno.EDQUOT, errno.EROFS), start=2):

            def fail(file: str, code: int = code) -> str:
                if policy.session.rank == failing_rank:
                    raise OSError(code, os.strerror(code))
                return file

            with opening(fail):
                save(step)
                try:
                    while True:
                        writer.poll()
                        time.sleep(0.01)
                except SaveFailed as failure:
                    found[errno.errorcode[code]] = str(failure)
        save(9)
        writer.finish()
        writer.finish()  # nothing is being written: no failure is told twice
        found["left"] = sorted(path.name for path in (Path(folder) / "run" / "checkpoints").iterdir())
    return found


def killed_while_saving(model: str, folder: str, attempts: int) -> None:
    """So many runs of two ranks in `folder/0`, `folder/1` ...: they save one checkpoint after the other, and
    are killed at random moments after the first.
    """
    import megatron_dapo.policy.step  # noqa: F401  # loaded once for all of them

    chance = random.Random(0)
    for attempt in range(attempts):
        run = Path(folder) / str(attempt)
        run.mkdir()
        ranks = [_forked(rank, lambda run=run: _save_for_ever(model, str(run))) for rank in range(2)]
        while not (run / "run" / "checkpoints" / "step_000001").is_dir():
            assert all(os.waitpid(rank, os.WNOHANG) == (0, 0) for rank in ranks), "a rank ended by itself"
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1))
        chance.shuffle(ranks)
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
            os.waitpid(rank, 0)


def _forked(rank: int, work: Callable[[], None]) -> int:
    """The process that does the work as this rank."""
    process = os.fork()
    if process == 0:
        os.environ["RANK"] = str(rank)
        try:
            work()
        finally:
            os._exit(1)
    return process


def _save_for_ever(model: str, folder: str) -> None:
    with open_run(model, "dp2", folder) as (policy, _, save):
        for step in itertools.count(1):
            update(policy, step)
            save(step)


@contextlib.contextmanager
def open_run(model: str, layout: str, folder: str) -> Iterator[Any]:
    """A policy, a writer in the background, and a function that saves a step to `folder/run`, keeping two."""
    from megatron_dapo import checkpoint
    from megatron_dapo.checkpoint_writer import CheckpointWriter

    run = PolicyRun(name="run", model=model, layout=layout, overrides=["optimizer.lr=1e-3"])
    with open_policy(run, f"{folder}/store") as policy:
        writer = CheckpointWriter(policy.session, in_background=True)

        def save(step: int) -> Path:
            is_first = policy.session.rank == 0
            state = checkpoint.RunState(step=step, rollouts={"step": step}) if is_first else None
            return checkpoint.save(Path(folder) / "run", policy, state, keep=2, writer=writer)

        yield policy, writer, save


def update(policy: Any, number: int) -> None:
    whole = plan(make_samples(), policy.session.layout, num_updates=2, budget="half")
    policy.update(part_of(policy, whole), number % 2)
