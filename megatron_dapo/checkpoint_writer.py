"""Writes checkpoint folders: a thread of each rank writes the rank's file, and rank 0's gives the folder its
name when all have. In the background it writes copies, while training goes on.

The threads talk through the run's store, so that they never meet a collective of the training. They end with
their process: what a killed run leaves is a folder `step_*.tmp`, which the next save removes, and the whole
checkpoints before it.
"""

from __future__ import annotations

import inspect
import os
import pickle
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_dapo.errors import UserError
from megatron_dapo.policy.session import Session

POLL_S = 0.02
# Megatron's own is a server process of every rank, which takes seconds to start and outlives a kill -9.
filesystem_async._results_queue = queue.Queue()


class SaveFailed(UserError):
    """A checkpoint could not be written; the previous one is untouched."""


class Planner(TorchDistSaveShardedStrategy):
    """Megatron's plan of which rank writes what, one file a rank; from the third plan on without asking the
    other ranks.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1, cached_metadata=True)
        self._validated = False
        self._copies: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._planned: tuple[Any, Any] = None, None

    def plan(self, state: dict[str, Any], folder: Path, *, copy: bool) -> tuple[FileSystemWriterAsync, Any]:
        """Collective. The writer of this rank's file in the folder and, on rank 0, the metadata of the whole.
        `copy`: the file is to be written from copies of the tensors, in memory of the host that stays for the
        next ones: fresh memory takes about as long as a disk.
        """
        parts: Any
        parts, _ = save_preprocess(state, validate_access_integrity=not self._validated)
        if copy:
            for part in nested_values(parts):
                if isinstance(part, ShardedTensor) and is_main_replica(part.replica_id):
                    part.data = self._copied(part)
            torch.cuda.synchronize()
        newer = "async_strategy" in inspect.signature(super().async_save).parameters
        self.async_save(parts, folder, **({"async_strategy": "mcore"} if newer else {}))
        self._validated = True
        (writer, metadata), self._planned = self._planned, (None, None)
        writer.write_buckets = writer.preload_tensors(writer.write_buckets or [])  # from a GPU, if not copied
        return writer, metadata

    def _copied(self, part: ShardedTensor) -> torch.Tensor:
        assert part.data is not None
        place = (part.key, part.global_offset)
        if place not in self._copies:
            pinned = part.data.is_cuda
            self._copies[place] = torch.empty(
                part.data.shape, dtype=part.dtype, device="cpu", pin_memory=pinned
            )
        return self._copies[place].copy_(part.data.detach(), non_blocking=True)

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *others: Any) -> Any:
        self._planned = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, *others)


class CheckpointWriter:
    """Writes one checkpoint at a time. All ranks call the same methods in the same order."""

    def __init__(self, session: Session, *, in_background: bool) -> None:
        self._session, self._store = session, session.channel.connection()
        self._in_background = in_background
        self._planner = Planner()
        self._num_begun = 0
        self._folder: Path | None = None  # that is being written
        self._thread = threading.Thread()
        self._failures: list[str] = []  # on rank 0, of all threads

    def write(
        self,
        folder: Path,
        state: dict[str, Any],
        files: dict[str, Any] | None,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """Write `folder`, when the one before is finished; in the background, only begin to. SaveFailed on
        all ranks when any could not write.

        state: sharded tensors, which may change again when this returns. files: on rank 0, what else is to be
        saved, by file name; it may not change. done: called on rank 0 when the folder has its name.
        """
        self.finish()
        temporary = folder.with_name(folder.name + ".tmp")
        self._fail_together(folder, _make_room(temporary) if self._session.rank == 0 else [])
        writer, metadata = self._planner.plan(state, temporary, copy=self._in_background)
        self._num_begun, self._folder = self._num_begun + 1, folder
        self._failures = ["rank 0: its thread has ended"]  # until it says otherwise

        def work() -> None:
            try:
                self._tell(_written(writer))
            except Exception as error:
                self._tell(f"{type(error).__name__}: {error}")
            if self._session.rank == 0:
                failures = self._complete(folder, writer, metadata, files or {})
                if not failures:
                    done()
                self._failures = failures

        self._thread = threading.Thread(target=work, name=f"writes {folder.name}", daemon=True)
        self._thread.start()
        if not self._in_background:
            self.finish()

    def poll(self) -> None:
        """Finish the checkpoint that is being written if it is complete, without waiting for it."""
        if self._folder and self._session.channel.share(not self._thread.is_alive()):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. SaveFailed on all ranks when any could not write."""
        if self._folder:
            folder, self._folder = self._folder, None
            self._thread.join()
            self._fail_together(folder, self._failures)

    def _tell(self, result: Any) -> None:
        """To rank 0: Megatron's results of what this rank has written, or a text that says what failed."""
        self._store.set(self._key(self._session.rank), pickle.dumps(result))  # type: ignore[arg-type]

    def _told(self, rank: int) -> Any:
        key = self._key(rank)
        while not self._store.check([key]):
            time.sleep(POLL_S)
        result = pickle.loads(self._store.get(key))
        self._store.delete_key(key)
        return result

    def _key(self, rank: int) -> str:
        return f"megatron_dapo/checkpoint/{self._num_begun}/{rank}"

    def _complete(self, folder: Path, writer: Any, metadata: Any, files: dict[str, Any]) -> list[str]:
        """On rank 0: the rest of the files, and the folder's name. Returns who failed, and how."""
        temporary = folder.with_name(folder.name + ".tmp")
        results = [self._told(rank) for rank in range(self._session.world_size)]
        failures = [f"rank {rank}: {told}" for rank, told in enumerate(results) if isinstance(told, str)]
        try:
            if not failures:
                save_config(CheckpointingConfig("torch_dist", 1), str(temporary))
                for name, value in {"common.pt": {}, **files}.items():
                    _save(value, temporary / name)
                writer.finish(metadata, results)
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(temporary, folder)
        except Exception as error:  # whatever layer reports a full disk
            failures = [f"rank 0: {type(error).__name__}: {error}"]
        if failures:
            shutil.rmtree(temporary, ignore_errors=True)
        return failures

    def _fail_together(self, folder: Path, failures: list[str]) -> None:
        """SaveFailed on every rank if rank 0 has failures."""
        if failed := self._session.channel.share(failures):
            raise SaveFailed(
                f"could not save {folder} ({'; '.join(failed)[:2000]}); free space on that disk or set "
                "run.dir, then resume; the previous checkpoint is untouched"
            )


def _make_room(temporary: Path) -> list[str]:
    """An empty folder, and none that a killed run has left. Returns what failed."""
    try:
        for left in temporary.parent.glob("step_*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        return [f"rank 0: {type(error).__name__}: {error}"]
    return []


def _written(writer: FileSystemWriterAsync) -> list[Any]:
    """Write this rank's file. Returns Megatron's results of it."""
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    results: list[Any] = []
    for number, bucket in enumerate(writer.write_buckets or []):
        outputs: Any = queue.Queue()
        running: Any = queue.Queue()  # Megatron takes the number out again
        running.put(number)
        writer.write_preloaded_data(transforms, number, bucket, outputs, running, use_fsync=True)
        _, result = outputs.get()
        if isinstance(result, Exception):
            raise result
        results += result
    return results


def _save(value: Any, file: Path) -> None:
    with open(file, "wb") as stream:
        torch.save(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
