"""A rank that pushes into a real weight receiver, in a process of its own, beside a replica that only notes
what it is asked (support/ranks.py starts it).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import read_model
from megatron_dapo.sync.exchange import Exchange
from megatron_dapo.sync.publish import Publisher, PublishReport
from megatron_dapo.sync.sinks import SinkTable
from megatron_dapo.sync.sources import holdings
from megatron_dapo.sync.staging import Means
from megatron_dapo.sync.staging_memory import HostMemory
from megatron_dapo.weights.names import hf_shapes
from megatron_dapo.weights.slices import Shard, Slice
from support import replicas
from support.push import checkpoint

CHUNK_BYTES = 50_000  # several rounds
DELAY_S = 0.02  # long beside the staging of a chunk
SHORT_S = 0.2
DIGESTS = "digests"


def receive(connection: Any, model: str, folder: str) -> None:
    """The worker's process: does what it is told until the connection ends. Answers results and errors."""
    torch.set_num_threads(1)
    from support.receiving import worker

    with worker(Path(model), Path(folder) / DIGESTS) as live:
        calls: dict[str, Callable[..., Any]] = {
            "sink_tables": lambda shapes: [live.sink_table(_empty(shapes)).to_json()],
            "start": live.receiver.start_weight_update,
            "update": live.receiver.update_weights,
            "finish": live.receiver.finish_weight_update,
            "as_loaded": live.as_loaded,
        }
        while True:
            try:
                name, delay_s, *arguments = connection.recv()
            except EOFError:
                return
            time.sleep(delay_s)
            try:
                connection.send(calls[name](*arguments))
            except (ValueError, RuntimeError) as error:
                connection.send(error)


def _empty(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(*shape) for name, shape in shapes.items()}


class Client:
    """Of the worker's process. delay_s: before it looks at a chunk. timeout_s: that it may take for one.
    damage: changes the memory of a chunk when it has been staged.
    """

    def __init__(self, connection: Any) -> None:
        self._connection, self._thread = connection, ThreadPoolExecutor(1)
        self.delay_s, self.timeout_s = 0.0, 60.0
        self.damage = False

    async def sink_tables(self, shapes: Mapping[str, Sequence[int]], dtype: str) -> list[Any]:
        return await self.ask("sink_tables", shapes)

    async def start_weight_update(self) -> None:
        await self.ask("start")

    async def update_weights(self, info: list[dict[str, Any]]) -> None:
        [manifest] = info
        if self.damage and manifest["num_bytes"]:
            with open(manifest["path"], "r+b") as file:
                file.seek(manifest["offset"] + manifest["num_bytes"] // 2)
                [byte] = file.read(1)
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))
        await self.ask("update", manifest, delay_s=self.delay_s)

    async def finish_weight_update(self, version: str) -> None:
        await self.ask("finish")

    async def ask(self, name: str, *arguments: Any, delay_s: float = 0.0) -> Any:
        answer = asyncio.get_running_loop().run_in_executor(self._thread, self._ask, name, delay_s, arguments)
        return await asyncio.wait_for(asyncio.shield(answer), self.timeout_s if name == "update" else 60)

    def _ask(self, name: str, delay_s: float, arguments: tuple[Any, ...]) -> Any:
        self._connection.send((name, delay_s, *arguments))
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Fleet(replicas.Fleet):
    """Calls go on in a thread, as those of the rollout service do."""

    def begin_call(
        self, names: Sequence[str], what: Callable[[str, Any], Awaitable[Any]]
    ) -> Callable[[], dict[str, Any]]:
        begun = self.threads.submit(super().begin_call, names, what)
        return lambda: begun.result()()

    threads = ThreadPoolExecutor(1)


def run(folders: list[str], folder: str) -> dict[str, Any]:
    """Pushes into a worker that has loaded the first of two models."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=receive, args=(theirs, folders[0], folder), daemon=True)
    process.start()
    theirs.close()
    spec, tensors = read_model(Path(folders[0])), [checkpoint(Path(name)) for name in folders]
    real = Client(ours)
    [answer] = asyncio.run(real.sink_tables(hf_shapes(spec), "float32"))
    fleet = Fleet(real=real, other=replicas.Client(tables=[SinkTable.from_json(answer)]))  # type: ignore
    world = dist.group.WORLD
    means = Means(
        rank=0, control=world, data=world, memory=HostMemory(), delta=False, store=None, timeout_s=30.0
    )
    exchange = Exchange(
        means,
        hosts=[replicas.HOST],
        held=holdings(spec, Layout()),
        chunk_bytes=CHUNK_BYTES,
        dtype="float32",
    )
    publisher = Publisher(exchange, lambda value: value, shapes=hf_shapes(spec), dtype="float32", verify=2)
    found: dict[str, Any] = {"load": asyncio.run(real.ask("as_loaded", "load"))}

    def push(name: str, version: int, which: int) -> None:
        report = publisher.publish(_shards(tensors[which]), version, fleet)
        found[name] = _told(report)
        if "real" in report.committed:
            found[name]["as_loaded"] = asyncio.run(real.ask("as_loaded", f"v{version}"))
        fleet.targets = list(fleet.clients)

    push("first", 0, 1)
    real.delay_s = DELAY_S
    push("slow", 1, 0)
    real.delay_s, real.damage = 0.0, True
    push("damaged", 2, 1)
    real.damage = False
    push("again", 3, 0)
    real.delay_s, real.timeout_s = 2 * SHORT_S, SHORT_S
    push("too slow", 4, 1)
    real.delay_s, real.timeout_s = 0.0, 60.0
    push("at last", 5, 0)
    ours.close()
    process.join()
    return found


def _shards(tensors: Mapping[str, torch.Tensor]) -> list[Shard]:
    return [Shard(name, t, (Slice(name, 0, 0, 0, t.shape[0]),)) for name, t in tensors.items()]


def _told(report: PublishReport) -> dict[str, Any]:
    return {"committed": list(report.committed), "failures": [str(failure) for failure in report.failures]}
