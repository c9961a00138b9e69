"""One weight push: begin on every replica, send every worker its chunks, commit. A replica that fails is left
behind.

The rollout wing knows the replicas; this file knows the order of the calls and what a failure means. A
replica that fails in any phase may hold a mixture of weights, so it gets nothing more of this push and is
handed back with `set_failed`, upon which the rollout wing restarts it; the others commit without it.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.rendezvous import without_prefix
from megatron_dapo.sync.device_memory import GpuMemory
from megatron_dapo.sync.exchange import Exchange
from megatron_dapo.sync.fp8_blocks import BlockWeights, block_holdings
from megatron_dapo.sync.manifest import Manifest
from megatron_dapo.sync.plan import Worker
from megatron_dapo.sync.sink_checks import problems
from megatron_dapo.sync.sinks import SinkTable
from megatron_dapo.sync.sources import LocalWeights, holdings
from megatron_dapo.sync.staging import Means
from megatron_dapo.sync.staging_memory import HostMemory
from megatron_dapo.sync.transport import Transport
from megatron_dapo.weights.block_fp8 import linear_weights, scale_shapes
from megatron_dapo.weights.hf import DTYPES
from megatron_dapo.weights.names import hf_shapes
from megatron_dapo.weights.slices import Shard

Shapes = Mapping[str, tuple[int, ...]]
Verify = Literal["never", "first"] | int
PROBLEMS_SHOWN = 5
CPU = torch.device("cpu")

Phase = Literal["begin", "send", "commit"]
WHILE = {
    "begin": "when the weight push began",
    "send": "while it received weights",
    "commit": "when the weight push was committed",
}


class Client(Protocol):
    """The calls on one replica that a push consists of (rollout/client.py)."""

    async def sink_tables(self, shapes: Shapes, dtype: str) -> list[Any]: ...

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, info: list[dict[str, Any]]) -> None: ...

    async def finish_weight_update(self, version: str) -> None: ...


Call = Callable[[str, Any], Awaitable[Any]]  # of a replica's name and its Client


class Replicas(Protocol):
    """What a push needs of the replicas (rollout/service.py). Names are those of `push_targets`."""

    def push_targets(self) -> list[str]:
        """The replicas that are alive."""
        ...

    def where(self, name: str) -> tuple[str, int] | None:
        """The replica's host, and the number of its first device there; None when it has left for good."""
        ...

    def begin_call(self, names: Sequence[str], what: Call) -> Callable[[], dict[str, Any]]:
        """Await `what(name, client)` on all of them at once. What is returned waits for the result, or the
        error, of each; neither raises.
        """
        ...

    def set_ready(self, name: str, version: int) -> None: ...

    def set_failed(self, name: str, phase: str, error: BaseException) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A replica that was left behind. `str()` is a sentence for the console."""

    name: str
    phase: Phase
    error: str
    timed_out: bool

    def __str__(self) -> str:
        return f"{self.name} {'timed out' if self.timed_out else 'failed'} {WHILE[self.phase]}: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What became of one push: which replicas hold the version now, and which were left behind and why.

    Known on the rank that has the replicas; on the others it is empty.
    """

    version: int
    committed: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()


class Publisher:
    """Pushes the policy's weights to all replicas.

    share(value): rank 0's value on every rank. shapes: of the checkpoint's tensors. dtype: of the policy's
    weights, as in torch without "torch.". verify: which pushes are checked byte by byte: none, the first, or
    every n-th. weights: what is sent of a rank's shards.
    """

    def __init__(
        self,
        transport: Transport,
        share: Callable[[Any], Any],
        *,
        shapes: Shapes,
        dtype: str,
        verify: Verify = "first",
        weights: Callable[[Sequence[Shard]], LocalWeights] = LocalWeights,
    ) -> None:
        self._transport, self._share, self._weights = transport, share, weights
        self._shapes, self._dtype, self._verify = shapes, dtype, verify
        self._tables: dict[str, list[SinkTable]] = {}  # rank 0: of every replica that was ever reached
        self._known: dict[str, SinkTable] = {}  # rank 0: every different table, by what was answered
        self._reached: dict[str, Client] = {}  # rank 0: who has told its tables; a restarted replica is new
        self._told: dict[str, Client] = {}  # rank 0: who knows the pieces of all chunks of these workers
        self._workers: list[Worker] = []  # all ranks: of the same replicas
        self._num_pushes = 0

    def publish(self, shards: Sequence[Shard], version: int, replicas: Replicas | None) -> PublishReport:
        """Collective: every rank brings its shards; the one that has `replicas` speaks to them.

        Whatever becomes of the replicas, every rank walks through all rounds. What the rollout wing itself
        raises (a mistake of ours) is raised after that. UserError, on all ranks, when an engine's loaders do
        not take the checkpoint as they should.
        """
        push = _Push(replicas, version) if replicas is not None else None
        workers, engines = self._agree(lambda: self._begin(push) if push else (None, []))
        if workers is not None:
            self._workers, self._told = workers, {}
        self._transport.set_workers(self._workers)
        verify, self._num_pushes = self._verifies(), self._num_pushes + 1
        for chunks in self._transport.rounds(self._weights(shards), version, engines=engines, verify=verify):
            if push:
                push.lose(self._transport.lost)
                push.send({name: self._brief(name, of_workers) for name, of_workers in chunks.items()})
        if push:
            push.lose(self._transport.lost)
            push.commit()
            self._told |= {name: self._reached[name] for name in push.following}
        return push.report() if push else PublishReport(version=version)

    def _verifies(self) -> bool:
        """Whether this push is checked."""
        if isinstance(self._verify, str):
            return self._verify == "first" and self._num_pushes == 0
        return self._num_pushes % self._verify == 0

    def _brief(self, name: str, manifests: list[Manifest]) -> list[Manifest]:
        """Without the pieces that the replica has been told in an earlier push."""
        knows = self._told.get(name) is self._reached[name]
        return [manifest.brief() for manifest in manifests] if knows else manifests

    def _agree(self, decide: Callable[[], Any]) -> Any:
        """Rank 0's decision, or its UserError, on every rank."""
        decision, failure = None, ""
        try:
            decision = decide()
        except UserError as error:
            failure = str(error)
        decision, failure = self._share((decision, failure))
        if failure:
            raise UserError(failure)
        return decision

    def _begin(self, push: _Push) -> tuple[list[Worker] | None, list[str]]:
        """Rank 0: all workers, or None if they are known; and the replicas that take part."""
        answers = push.tables_of_new(self._reached, self._shapes, self._dtype)
        for name, of_workers in answers.items():
            tables = [self._table(name, answer) for answer in of_workers]
            if tables not in self._tables.values():  # many engines are alike: each kind is checked once
                _check(name, tables, self._shapes)
            self._tables[name] = tables
        push.begin()
        workers = push.workers(self._tables)
        engines = {worker.engine for worker in workers}
        push.lose({name: "it has left the run" for name in push.following if name not in engines})
        return workers if workers != self._workers else None, push.following

    def _table(self, name: str, answer: Any) -> SinkTable:
        """What a replica's worker has answered; of equal answers, one object."""
        text = json.dumps(answer)
        if text not in self._known:
            try:
                self._known[text] = SinkTable.from_json(answer)
            except ValueError as error:
                raise UserError(f"{name} has told a sink table that cannot be used: {error}") from error
        return self._known[text]


def make_publisher(
    config: RunConfig,
    model: ModelSpec,
    rank: int,
    hosts: Sequence[str],
    control: Any,
    store: Any = None,
    device: torch.device = CPU,
) -> Publisher:
    """Of a run. hosts: by rank, the name of its host. control: a gloo group of all ranks. store: a connection
    to the run's store, for engines on hosts without ranks. device: of this rank; weights travel over NCCL
    from GPU to GPU, but for deltas, which are made in memory of the host.
    """

    def share(value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=control)
        return values[0]

    dtype, shapes = str(DTYPES[config.model.dtype]).removeprefix("torch."), hf_shapes(model)
    in_fp8 = linear_weights(shapes) if config.rollout.quantization else {}
    on_gpu = device.type == "cuda" and not config.sync.delta
    means = Means(
        rank=rank,
        control=control,
        data=dist.group.WORLD if on_gpu else control,
        memory=GpuMemory(device) if on_gpu else HostMemory(),
        delta=config.sync.delta,
        store=without_prefix(store),
        timeout_s=config.rollout.progress_timeout_s,
    )
    exchange = Exchange(
        means,
        hosts=hosts,
        held=block_holdings(holdings(model, config.layout.to_layout()), in_fp8),
        chunk_bytes=config.sync.chunk_bytes,
        dtype=dtype,
    )
    return Publisher(
        exchange,
        share,
        shapes={**shapes, **scale_shapes(in_fp8)},
        dtype=dtype,
        verify=config.sync.verify,
        weights=lambda shards: BlockWeights(shards, in_fp8),
    )


class _Push:
    """One push as the rank sees it that speaks to the replicas."""

    def __init__(self, replicas: Replicas, version: int) -> None:
        self._replicas, self._version = replicas, version
        self.following: list[str] = []  # replicas that have answered every call so far
        self._failures: list[Failure] = []
        self._mistake: Exception | None = None  # what `replicas` raised though it must not
        # What waits for the calls that are under way: the first of the push, and the last round's.
        self._begun: Callable[[], None] = lambda: None
        self._answers: Callable[[], None] = lambda: None
        try:
            self.following = list(replicas.push_targets())
        except Exception as error:
            self._mistake = error

    def tables_of_new(self, reached: dict[str, Client], shapes: Shapes, dtype: str) -> dict[str, list[Any]]:
        """The answers of replicas that have not told their workers' sink tables; they are then `reached`."""
        found: dict[str, list[Any]] = {}

        async def ask(name: str, client: Client) -> None:
            if reached.get(name) is not client:
                found[name] = await client.sink_tables(shapes, dtype)
                reached[name] = client

        self._on_all("begin", ask)
        return {name: found[name] for name in self.following if name in found}

    def workers(self, tables: Mapping[str, Sequence[SinkTable]]) -> list[Worker]:
        """Of all replicas that have tables and have not left."""
        workers = []
        for name, of_replica in tables.items():
            if (place := self._replicas.where(name)) is None:
                continue
            host, device = place
            workers += [
                Worker(engine=name, rank=rank, host=host, device=device + rank, table=table)
                for rank, table in enumerate(of_replica)
            ]
        return workers

    def begin(self) -> None:
        """Returns while the engines get ready; the first round is put together meanwhile."""
        self._begun = self._begin_on_all("begin", lambda name, client: client.start_weight_update())

    def lose(self, lost: Mapping[str, str]) -> None:
        """These replicas get nothing more, for the reasons given."""
        for name in [name for name in self.following if name in lost]:
            self._leave_behind(name, "send", ConnectionError(lost[name]))

    def send(self, chunks: Mapping[str, Sequence[Manifest]]) -> None:
        """Hand over a round, and return while the engines load it: what the round before it has come to is
        known by then. It is sent while they load that one, which they finish first: they do not wait for us.
        """
        infos = {name: [manifest.to_json() for manifest in manifests] for name, manifests in chunks.items()}
        self._begun()
        before = self._answers
        self._answers = self._begin_on_all("send", lambda name, client: client.update_weights(infos[name]))
        before()

    def commit(self) -> None:
        """The new weights count. Cached prefixes of the old ones are the rollout wing's matter, which empties
        the cache when it pauses, or salts what it asks for by the version.
        """
        self._begun()
        self._answers()
        self._on_all("commit", lambda name, client: client.finish_weight_update(str(self._version)))

    def report(self) -> PublishReport:
        if self._mistake is not None:
            raise self._mistake
        for name in self.following:
            self._replicas.set_ready(name, self._version)
        return PublishReport(
            version=self._version, committed=tuple(self.following), failures=tuple(self._failures)
        )

    def _on_all(self, phase: Phase, what: Call) -> None:
        self._begin_on_all(phase, what)()

    def _begin_on_all(self, phase: Phase, what: Call) -> Callable[[], None]:
        """Begin a call on every replica that still follows. Calling the result waits for the answers; who
        failed follows no longer.
        """
        asked = list(self.following)
        if self._mistake is not None or not asked:
            return lambda: None
        try:
            wait = self._replicas.begin_call(asked, what)
        except Exception as error:
            self._mistake = error
            return lambda: None

        def answers() -> None:
            try:
                results = wait()
                for name in asked:
                    if isinstance(error := results[name], BaseException):
                        self._leave_behind(name, phase, error)
            except Exception as error:
                self._mistake = error

        return answers

    def _leave_behind(self, name: str, phase: Phase, error: BaseException) -> None:
        """Once for each replica, whose first error counts."""
        if name in self.following:
            self.following.remove(name)
            self._failures.append(_failure(name, phase, error))
            self._replicas.set_failed(name, phase, error)


def _check(name: str, tables: Sequence[SinkTable], shapes: Shapes) -> None:
    """UserError unless the replica's loaders take every element of the checkpoint to its place."""
    if wrong := problems(tables, shapes):
        more = f"; and {len(wrong) - PROBLEMS_SHOWN} more" if len(wrong) > PROBLEMS_SHOWN else ""
        raise UserError(
            f"{name} would not take the weights as the checkpoint has them: "
            f"{'; '.join(wrong[:PROBLEMS_SHOWN])}{more}"
        )


def _failure(name: str, phase: Phase, error: BaseException) -> Failure:
    """A time-out says that nothing was answered in time; everything else says by its type what it is."""
    if not isinstance(error, TimeoutError):
        return Failure(name=name, phase=phase, error=f"{type(error).__name__}: {error}", timed_out=False)
    return Failure(
        name=name, phase=phase, error=str(error) or "it did not answer within the time-out", timed_out=True
    )
