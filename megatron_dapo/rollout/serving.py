"""Hosts without ranks that join a run, run engines for it, and leave it, all while it goes on.

Rank 0 and the process of such a host (serve.py) tell each other in the run's store, without the prefixes of
ranks, and each has the other on a lifeline (lifeline.py), which begins with the first host. The keys, under
megatron_dapo/serving/:

    run          what a host has to know of the run, {"first": number of the first engine of the first host,
                 "settings": values of SETTINGS}; it is there as long as hosts may join
    lifeline     {"port", "token"} of rank 0's lifeline
    ended        the run has ended
    engines      counts engines of all hosts so far, hosts counts hosts: a host takes the next numbers
    K/host       of host number K: {"name", "first": its first engine, "engines": how many}
    K/leaves     it wants to leave
    K/left       no engine of it is used any more, "" or why
    K/knows      it has read that the run has ended
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.lifeline import Clocks, Lifeline, LifelineRefused, Loss
from megatron_dapo.rendezvous import Store, without_prefix
from megatron_dapo.rollout.client import file_descriptors_needed
from megatron_dapo.rollout.files import raise_file_limit
from megatron_dapo.rollout.fleet import Fleet
from megatron_dapo.rollout.hosts import SILENT_S, RemoteServer, SignsOfLife, alive_key
from megatron_dapo.rollout.replica import Replica
from megatron_dapo.rollout.upkeep import EngineFailure

LOOK_S = 0.5  # how often both sides look into the store
GOODBYE_S = 5.0  # that rank 0 waits until hosts know that the run has ended
CLOCKS = Clocks()
# What engines of all hosts have in common; everything else is the host's own matter.
SETTINGS = (
    "model.dtype",
    "rollout.quantization",
    "rollout.tensor_parallel",
    "rollout.max_tokens",
    "rollout.max_concurrency",
    "data.max_prompt_tokens",
    "run.seed",
    "run.verify_sync",
)


@dataclass(slots=True, kw_only=True)
class _Host:
    """A host that has joined, as rank 0 knows it."""

    number: int
    name: str
    engines: list[str]
    signs_of_life: SignsOfLife
    leaves: bool = False


class ServingHosts:
    """Rank 0's side: takes hosts into the fleet as they join, and out as they leave or are lost.

    store: of the run. token: of its servers. num_engines: those on the hosts of ranks. message: gets a
    sentence for the console. clock: counts seconds.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Any,
        token: str,
        fleet: Fleet,
        *,
        num_engines: int,
        message: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._token, self._fleet = config, token, fleet
        self._store, self._message, self._clock = without_prefix(store), message, clock
        self._num_engines, self._num_known = num_engines, 0
        self._expected: list[int] = []  # numbers that hosts have taken which have not joined yet
        self._hosts: list[_Host] = []
        self._lifeline: Lifeline | None = None
        self._losses = deque[Loss]()  # that the lifeline's thread has noticed
        self._waits_since: float | None = None  # for enough engines to begin with

    def open(self) -> None:
        """Let hosts join from now on."""
        run = {"first": self._num_engines, "settings": settings(self._config)}
        self._store.set(_key("run"), json.dumps(run))
        self._waits_since = self._clock()
        if not self._config.rollout.colocated and isinstance(self._store, dist.TCPStore):
            self._message(f"waiting for engines; {self._how_to_join()}")

    async def watch(self) -> None:
        """Look again and again, until cancelled or the store has ended."""
        try:
            while True:
                self.look()
                await asyncio.sleep(LOOK_S)
        except dist.DistError:  # so will the run
            return
        except Exception as error:
            self._fleet.router.end(error)  # a fault of this code ends the run with its traceback

    def look(self) -> None:
        """Do what the hosts want, and give up those that are lost."""
        num_hosts = self._store.add(_key("hosts"), 0)
        self._expected += range(self._num_known, num_hosts)
        self._num_known = num_hosts
        for number in list(self._expected):
            if self._store.check([_key(number, "host")]):
                self._expected.remove(number)
                self._admit(number)
        while self._losses:
            loss = self._losses.popleft()
            for host in [host for host in self._hosts if host.name == loss.peer]:
                self._lose(host, loss.reason)
        for host in list(self._hosts):
            if host.signs_of_life.are_missing():
                self._lose(host, f"{host.name} has given no sign of life for {SILENT_S:g} s")
            elif not host.leaves and self._store.check([_key(host.number, "leaves")]):
                self._let_go(host)
        self._expect_enough()

    async def close(self) -> None:
        """Say that the run has ended, and wait until its hosts know it; a while at most."""
        with suppress(dist.DistError):
            self._store.set(_key("ended"), "")
            deadline = time.monotonic() + GOODBYE_S
            while self._hosts and time.monotonic() < deadline:
                self._hosts = [
                    host
                    for host in self._hosts
                    if not (
                        self._store.check([_key(host.number, "knows")]) or host.signs_of_life.are_missing()
                    )
                ]
                await asyncio.sleep(LOOK_S / 5)
        if self._lifeline:
            self._lifeline.close()

    def _lose(self, host: _Host, reason: str) -> None:
        self._hosts.remove(host)
        self._store.set(_key(host.number, "left"), reason)
        self._fleet.lose(host.engines, reason)

    def _admit(self, number: int) -> None:
        said = json.loads(self._store.get(_key(number, "host")))
        rollout, name = self._config.rollout, said["name"]
        num_engines = len(self._fleet.replicas) + said["engines"]
        try:
            raise_file_limit(file_descriptors_needed(rollout, math.ceil(num_engines / rollout.engines)))
        except UserError as error:
            self._message(f"{name} cannot join: {error}")
            return self._store.set(_key(number, "left"), str(error))
        if self._lifeline is None:
            token = secrets.token_urlsafe(32)
            self._lifeline = Lifeline.serve(token, (), self._losses.append, clocks=CLOCKS)
            self._store.set(_key("lifeline"), json.dumps({"port": self._lifeline.port, "token": token}))
        signs = SignsOfLife(self._store, alive_key(name), self._clock)
        numbers = range(said["first"], said["first"] + said["engines"])
        engines = [f"engine_{index}" for index in numbers]
        self._hosts.append(_Host(number=number, name=name, engines=engines, signs_of_life=signs))
        self._message(f"{name} has joined with {', '.join(engines)}")
        for slot, index in enumerate(numbers):
            server = RemoteServer(
                self._store, index, name, self._token, signs_of_life=signs, clock=self._clock
            )
            device = slot * rollout.tensor_parallel
            self._fleet.add(
                Replica(name=engines[slot], server=server, host=name, device=device, host_lives=signs.another)
            )

    def _let_go(self, host: _Host) -> None:
        host.leaves = True
        self._message(f"{host.name} leaves once the requests of {', '.join(host.engines)} have ended")

        def out() -> None:
            if host in self._hosts:
                self._hosts.remove(host)
                self._store.set(_key(host.number, "left"), "")
                self._message(f"{host.name} has left")

        self._fleet.leave(host.engines, out)

    def _expect_enough(self) -> None:
        """End the run when too few engines have joined within rollout.start_timeout_s from the beginning."""
        if self._waits_since is None:
            return
        rollout, known = self._config.rollout, len(self._fleet.replicas)
        if known >= rollout.min_engines:
            self._waits_since = None
        elif self._clock() - self._waits_since > rollout.start_timeout_s:
            self._waits_since = None
            self._fleet.router.end(
                EngineFailure(
                    f"{known} of rollout.min_engines={rollout.min_engines} engines have joined within "
                    f"{rollout.start_timeout_s:g} s; {self._how_to_join()}, or raise rollout.start_timeout_s"
                )
            )

    def _how_to_join(self) -> str:
        address = "MASTER_ADDR:MASTER_PORT"
        if isinstance(self._store, dist.TCPStore):
            address = f"{self._store.host}:{self._store.port}"
        return f"on each of their hosts run: python -m megatron_dapo.serve CONFIG.yaml --join {address}"


class Membership:
    """A host's side, from joining on. Its `engines` have numbers of their own in the run, and it has a
    `name`.
    """

    def __init__(self, store: Store, host: str, num_engines: int, rank_0: str) -> None:
        """The run must be `open_to` this host. rank_0: the address of rank 0's host."""
        self._store, self._rank_0 = store, rank_0
        self._lifeline: Lifeline | None = None
        self._lost, self._made_at = "", time.monotonic()
        run = json.loads(store.get(_key("run")))
        self.number = store.add(_key("hosts"), 1) - 1
        self.name = f"serve {self.number} on {host}"
        first = run["first"] + store.add(_key("engines"), num_engines) - num_engines
        self.engines = range(first, first + num_engines)
        self.refused = ""  # why the run goes on without it, unless it has asked for that

    def join(self) -> None:
        """Have rank 0 use the engines."""
        self._store.add(alive_key(self.name), 1)  # from here on silence counts
        said = {"name": self.name, "first": self.engines.start, "engines": len(self.engines)}
        self._store.set(_key(self.number, "host"), json.dumps(said))

    def leave(self) -> None:
        """Ask rank 0 to use the engines no more; it is done when `look` says "left"."""
        self._store.set(_key(self.number, "leaves"), "")

    def look(self) -> Literal["joined", "left", "ended"]:
        """How it stands with the host and the run. DistError when the store has ended."""
        if self._lifeline is None and not self._lost and self._store.check([_key("lifeline")]):
            self._take_lifeline()
        if self._store.check([_key("ended")]):
            self._store.set(_key(self.number, "knows"), "")
            return "ended"
        if self._store.check([_key(self.number, "left")]):
            self.refused = self._store.get(_key(self.number, "left")).decode()
            return "left"
        return "joined"

    @property
    def lost(self) -> str:
        """Why the run is lost; "" while it is not."""
        waited_s = time.monotonic() - self._made_at
        if not self._lost and self._lifeline is None and waited_s > CLOCKS.held_s:
            return f"rank 0 has given no sign of life within {CLOCKS.held_s:g} s"
        return self._lost

    def close(self) -> None:
        """Say goodbye to rank 0, if it is there."""
        if self._lifeline:
            self._lifeline.close()

    def _take_lifeline(self) -> None:
        said = json.loads(self._store.get(_key("lifeline")))
        address = self._rank_0, said["port"]
        try:
            self._lifeline = Lifeline.join(address, said["token"], self.name, self._on_loss, clocks=CLOCKS)
        except LifelineRefused as error:
            self._lost = str(error)

    def _on_loss(self, loss: Loss) -> None:
        self._lost = f"the run is gone: {loss.reason}"


def open_to(store: Store, config: RunConfig) -> bool:
    """Whether the run has begun to let hosts join. UserError if it needs other engines than `config` has."""
    if not store.check([_key("run")]):
        return False
    mine = settings(config)
    for name, value in json.loads(store.get(_key("run")))["settings"].items():
        if mine.get(name) != value:
            raise UserError(
                f"{name}={mine.get(name)} differs from {value} of the run that this host is to join; give "
                "the run's configuration and overrides, or set it alike"
            )
    return True


def settings(config: RunConfig) -> dict[str, Any]:
    """The values of SETTINGS."""
    return {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in SETTINGS}


def _key(*parts: object) -> str:
    return "/".join(["megatron_dapo/serving", *map(str, parts)])
