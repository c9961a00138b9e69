"""Engines that a weight push goes to, without a rollout service: servers, or receivers in processes of their
own that serve nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dapo.sync.publish import Call, Client

HOST = "here"


class Targets:
    """Replicas (sync/publish.py), all on one host. Their clients run in a thread with an event loop. A push
    that fails on one of them raises.
    """

    def __init__(self, clients: Mapping[str, Client]) -> None:
        self.clients = clients
        self.ready: dict[str, int] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def push_targets(self) -> list[str]:
        return list(self.clients)

    def where(self, name: str) -> tuple[str, int]:
        return HOST, list(self.clients).index(name)

    def begin_call(self, names: Sequence[str], what: Call) -> Callable[[], dict[str, Any]]:
        async def on_all() -> list[Any]:
            calls = (what(name, self.clients[name]) for name in names)
            return await asyncio.gather(*calls, return_exceptions=True)

        future = asyncio.run_coroutine_threadsafe(on_all(), self._loop)
        return lambda: dict(zip(names, future.result(), strict=True))

    def set_ready(self, name: str, version: int) -> None:
        self.ready[name] = version

    def set_failed(self, name: str, phase: str, error: BaseException) -> None:
        raise AssertionError(f"{name} failed in {phase}") from error


class ReceiverEngine:
    """The client of an engine whose `tp` workers hold weights and serve nothing, each in its own process."""

    def __init__(self, tp: int, folder: Path) -> None:
        self.workers = [_Process(tp, rank, folder / f"tp{tp}") for rank in range(tp)]

    def on_workers(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """What the method of _Receiver returns on each worker. arguments: by worker."""
        for worker, of_worker in zip(self.workers, arguments, strict=True):
            worker.ask(method, *of_worker)
        return [worker.answer() for worker in self.workers]

    def on_all(self, method: str, *arguments: Any) -> list[Any]:
        return self.on_workers(method, [arguments] * len(self.workers))

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    async def sink_tables(self, shapes: Mapping[str, Sequence[int]], dtype: str) -> list[Any]:
        return self.on_all("sink_table", {name: list(shape) for name, shape in shapes.items()}, dtype)

    async def start_weight_update(self) -> None:
        self.on_all("start")

    async def update_weights(self, info: list[dict[str, Any]]) -> None:
        self.on_workers("update", [[manifest] for manifest in info])

    async def finish_weight_update(self, version: str) -> None:
        self.on_all("finish")


class _Process:
    """The parent's end of a worker's process, which ends when this one is closed or its process is gone."""

    def __init__(self, tp: int, rank: int, digests: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, tp, rank, digests), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> None:
        self._connection.send((method, arguments))

    def answer(self) -> Any:
        answer, failure = self._connection.recv()
        assert not failure, failure
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _work(connection: Any, tp: int, rank: int, digests: Path) -> None:
    """A worker: answers until nobody asks any more."""
    import traceback

    import torch

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    receiver = _Receiver(tp, rank, digests)
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = connection.recv()
            try:
                answer = getattr(receiver, method)(*arguments), ""
            except Exception:
                answer = None, traceback.format_exc()
            connection.send(answer)


class _Receiver:
    """One worker. `open` gives it a model; then the calls of a push."""

    def __init__(self, tp: int, rank: int, digests: Path) -> None:
        self._rank, self._digests = rank, digests
        self._options: dict[str, Any] = {"tp": tp, "dtype": "float32"}
        self._stack = contextlib.ExitStack()

    def use_fp8_kernels(self) -> None:
        """Load bf16 models from now on, whose config.json may be one of block FP8."""
        from support import fp8_worker

        assert fp8_worker
        self._options["dtype"] = "bfloat16"

    def open(self, folder: Path) -> None:
        """Load the checkpoint, as vLLM does; a model that was opened before is dropped."""
        from support.receiving import worker

        self._stack.close()
        self._worker = self._stack.enter_context(worker(folder, self._digests, self._rank, **self._options))
        gc.freeze()  # vLLM collects garbage at every load, which takes a second with its modules in it

    def sink_table(self, shapes: dict[str, list[int]], dtype: str) -> Any:
        from megatron_dapo.sync.vllm.extension import WorkerExtension

        return WorkerExtension.megatron_dapo_sink_table(self._worker, shapes, dtype)  # type: ignore

    def start(self) -> None:
        self._worker.receiver.start_weight_update()

    def update(self, manifest: dict[str, Any]) -> None:
        self._worker.receiver.update_weights(manifest)

    def finish(self) -> None:
        self._worker.receiver.finish_weight_update()

    def fresh_digests(self, export: Path) -> dict[str, str]:
        """Of what vLLM loads from the export, on this worker's rank of an engine."""
        self._fresh(export)
        return self._worker.as_loaded("load")

    def held_and_fresh(self, export: Path, version: int) -> tuple[dict[str, str], dict[str, str], list[str]]:
        """(digests of what was pushed, of what vLLM loads from the export, what the kernels make of both and
        is not equal in every bit).
        """
        from support.receiving import computed, differing

        fresh = self._fresh(export)
        different = differing(computed(self._worker.model), computed(fresh.model))
        return self._worker.as_loaded(f"v{version}"), self._worker.as_loaded("load"), sorted(different)

    def _fresh(self, export: Path) -> Any:
        from megatron_dapo.sync.vllm import sinks_pretend
        from support.receiving import Worker

        config = sinks_pretend.engine_config(export, **self._options)
        return Worker(config, self._digests)


@contextlib.contextmanager
def receiver_engines(folder: Path, sizes: Sequence[int]) -> Iterator[dict[str, ReceiverEngine]]:
    """Engines of these tensor-parallel sizes, by name (tp1, tp2)."""
    engines = {f"tp{tp}": ReceiverEngine(tp, folder) for tp in sizes}
    try:
        yield engines
    finally:
        for engine in engines.values():
            engine.close()
