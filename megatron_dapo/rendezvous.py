"""Where the processes of a run meet: torchrun's store, and the address that a host is reached by."""

from __future__ import annotations

import socket
from typing import Any, Protocol

import torch.distributed as dist

from megatron_dapo.errors import UserError


class Store(Protocol):
    """What is used of torch.distributed.Store; nothing that waits."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def add(self, key: str, amount: int, /) -> int: ...


def without_prefix(store: Any) -> Any:
    """The store behind the prefixes that torch puts before the keys of a rank: a process that is no rank
    finds the same keys in it.
    """
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def address_towards(host: str) -> str:
    """The address of this host that `host` sees; nothing is sent. UserError when there is no way to it."""
    reason: OSError | None = None
    try:
        for family, kind, _, _, target in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            try:
                with socket.socket(family, kind) as probe:
                    probe.connect(target)
                    return probe.getsockname()[0]
            except OSError as error:
                reason = error
    except OSError as error:
        reason = error
    raise UserError(
        f"{host} cannot be reached from {socket.gethostname()} ({reason}); give an address of it that all "
        "hosts of the run reach (MASTER_ADDR is the first node's)"
    )
