"""Engines on a host without ranks:

    python -m megatron_dapo.serve CONFIG.yaml [section.key=value ...] --join MASTER_ADDR:MASTER_PORT

starts rollout.engines engines of this host for the run whose store is there (torchrun's; the run's console
names it with rollout.colocated=false), as soon as it is up, and ends with it. CONFIG.yaml and overrides are
the run's; what only concerns this host may differ. SIGTERM or Ctrl-C: the engines end their requests, the
run goes on without them, and this process ends; a second one ends it at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from contextlib import closing
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rendezvous import address_towards
from megatron_dapo.rollout.hosts import run_engines
from megatron_dapo.rollout.serving import LOOK_S, Membership, open_to
from megatron_dapo.sync.host_carrier import HostCarrier
from megatron_dapo.weights.hf import resolve_folder

STORE_TIMEOUT = timedelta(seconds=60)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dapo.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--join", required=True, metavar="MASTER_ADDR:MASTER_PORT")
    options = parser.parse_intermixed_args(arguments)
    path, overrides = options.config, list(options.overrides)
    if path and "=" in path:
        path, overrides = None, [path, *overrides]
    leaving = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: _leave(leaving))
    signal.signal(signal.SIGINT, lambda number, frame: _leave(leaving))
    try:
        config = RunConfig.load(path, overrides)
        return serve(config, _address(options.join), leaving)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def serve(config: RunConfig, address: tuple[str, int], leaving: threading.Event) -> int:
    """Serve the run at this address until it ends, or until this host has left it after `leaving` was set.
    Returns the exit code: 1 when the run is gone without a word. UserError when this host cannot join.
    """
    folder = resolve_folder(config.model.path)
    deadline = time.monotonic() + config.rollout.start_timeout_s
    store = _connect(address, deadline, leaving)
    while store is not None and not open_to(store, config):
        _check(address, deadline)
        if leaving.wait(LOOK_S):
            return 0
    if store is None:
        return 0
    member = Membership(store.clone(), socket.gethostname(), config.rollout.engines, address[0])
    own = address_towards(address[0])
    carrier = HostCarrier(store.clone(), member.name, own)
    engines = run_engines(config, folder, store.clone(), member.name, member.engines, own)
    carrier.start()
    with closing(member), closing(engines), closing(carrier):
        member.join()
        numbers = f"{member.engines.start} to {member.engines.stop - 1}"
        print(f"{member.name} has joined with engines {numbers}", flush=True)
        return _stay(member, leaving)


def _stay(member: Membership, leaving: threading.Event) -> int:
    """As `serve`, from joining on."""
    outcome: list[str] = []

    def watch() -> None:
        asked = False
        try:
            while (found := member.look()) == "joined":
                if leaving.is_set() and not asked:
                    asked = True
                    print(f"{member.name} leaves once the requests of its engines have ended", flush=True)
                    member.leave()
                time.sleep(LOOK_S)
        except dist.DistError:
            found = "gone"
        outcome.append(found)

    # in a thread, because the store of a host that has lost its power never answers
    threading.Thread(target=watch, name="run", daemon=True).start()
    while not outcome:
        if member.lost:
            print(f"error: {member.lost}", file=sys.stderr, flush=True)
            os._exit(1)  # threads may wait for its store; the engines die with this process
        time.sleep(LOOK_S / 5)
    if outcome == ["gone"]:
        print("error: the run is gone: its store does not answer any more", file=sys.stderr)
        return 1
    if member.refused:
        raise UserError(f"the run goes on without {member.name}: {member.refused}")
    print(f"{member.name} has left" if outcome == ["left"] else "the run has ended", flush=True)
    return 0


def _connect(address: tuple[str, int], deadline: float, leaving: threading.Event) -> Any:
    """The run's store, when it is up; None when `leaving` was set before. UserError after the deadline."""
    while not leaving.is_set():
        try:
            socket.create_connection(address, timeout=5).close()  # torch would fill the console meanwhile
            return dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)
        except (OSError, dist.DistError):
            _check(address, deadline)
            leaving.wait(LOOK_S)
    return None


def _check(address: tuple[str, int], deadline: float) -> None:
    if time.monotonic() > deadline:
        raise UserError(
            f"--join {address[0]}:{address[1]}: no run has let this host join within "
            "rollout.start_timeout_s; give the MASTER_ADDR and MASTER_PORT of the run's torchrun, or raise "
            "rollout.start_timeout_s"
        )


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise UserError(f"--join {text} must be MASTER_ADDR:MASTER_PORT, as of the run's torchrun")
    return host.strip("[]"), int(port)


def _leave(leaving: threading.Event) -> None:
    if leaving.is_set():
        os._exit(1)
    leaving.set()


if __name__ == "__main__":
    sys.exit(main())
