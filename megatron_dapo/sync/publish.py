"""One weight push: begin on every replica, send every chunk, commit. A replica that fails is left behind.

The rollout wing knows the replicas; this file knows the order of the calls and what a failure means. A
replica that fails in any phase may hold a mixture of weights, so it gets nothing more of this push and is
handed back with `set_failed`, upon which the rollout wing restarts it; the others commit without it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from megatron_dapo.sync.manifest import Manifest
from megatron_dapo.sync.transport import Transport
from megatron_dapo.weights.slices import Shard

Phase = Literal["begin", "send", "commit"]
WHILE = {
    "begin": "when the weight push began",
    "send": "while it received weights",
    "commit": "when the weight push was committed",
}


class Client(Protocol):
    """The calls on one replica that a push consists of (rollout/client.py)."""

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, info: dict[str, Any]) -> None: ...

    async def finish_weight_update(self, version: str) -> None: ...


class Replicas(Protocol):
    """What a push needs of the replicas (rollout/service.py). Names are those of `push_targets`."""

    def push_targets(self) -> list[str]:
        """The replicas that are alive."""
        ...

    def call(
        self, names: Sequence[str], what: Callable[[Any], Awaitable[None]]
    ) -> dict[str, BaseException | None]:
        """Await `what(client)` on all of them at once. One error, or None, for each; never raises."""
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
    """Pushes the policy's weights to all replicas over one transport."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def publish(self, shards: Sequence[Shard], version: int, replicas: Replicas | None) -> PublishReport:
        """Collective: every rank brings its shards; the one that has `replicas` speaks to them.

        Whatever becomes of the replicas, every rank walks through all chunks. What the rollout wing itself
        raises (a mistake of ours) is raised after that.
        """
        push = _Push(replicas, version) if replicas is not None else None
        if push:
            push.begin()
        for manifest in self._transport.chunks(shards, version):
            if push:
                push.send(manifest)
        if push:
            push.commit()
        return push.report() if push else PublishReport(version=version)


class _Push:
    """One push as the rank sees it that speaks to the replicas."""

    def __init__(self, replicas: Replicas, version: int) -> None:
        self._replicas, self._version = replicas, version
        self._following: list[str] = []  # replicas that have answered every call so far
        self._failures: list[Failure] = []
        self._mistake: Exception | None = None  # what `replicas` raised though it must not

    def begin(self) -> None:
        try:
            self._following = list(self._replicas.push_targets())
        except Exception as error:
            self._mistake = error
        self._on_all("begin", lambda client: client.start_weight_update())

    def send(self, manifest: Manifest) -> None:
        info = manifest.to_json()
        self._on_all("send", lambda client: client.update_weights(info))

    def commit(self) -> None:
        """The new weights count. Cached prefixes of the old ones are the rollout wing's matter, which empties
        the cache when it pauses, or salts what it asks for by the version.
        """
        self._on_all("commit", lambda client: client.finish_weight_update(str(self._version)))

    def report(self) -> PublishReport:
        if self._mistake is not None:
            raise self._mistake
        for name in self._following:
            self._replicas.set_ready(name, self._version)
        return PublishReport(
            version=self._version, committed=tuple(self._following), failures=tuple(self._failures)
        )

    def _on_all(self, phase: Phase, what: Callable[[Any], Awaitable[None]]) -> None:
        """Make a call on every replica that still follows; who fails follows no longer."""
        if self._mistake is not None or not self._following:
            return
        try:
            asked = self._following
            errors = self._replicas.call(asked, what)
            self._following = [name for name in asked if errors[name] is None]
            for name in asked:
                if (error := errors[name]) is not None:
                    self._failures.append(_failure(name, phase, error))
                    self._replicas.set_failed(name, phase, error)
        except Exception as error:
            self._mistake = error


def _failure(name: str, phase: Phase, error: BaseException) -> Failure:
    """A time-out says that nothing was answered in time; everything else says by its type what it is."""
    if not isinstance(error, TimeoutError):
        return Failure(name=name, phase=phase, error=f"{type(error).__name__}: {error}", timed_out=False)
    return Failure(
        name=name, phase=phase, error=str(error) or "it did not answer within the time-out", timed_out=True
    )
