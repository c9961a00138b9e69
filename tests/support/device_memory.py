"""A runtime of GPUs that are not there: memory of the host under addresses that a list knows."""

from __future__ import annotations

import torch

LIMIT = 1 << 30  # bytes of one allocation


class Machine:
    """What the processes of a host have in common. allocated: by address. open: what processes have opened
    and not closed, as (UUID, handle in hexadecimal digits).
    """

    def __init__(self) -> None:
        self.allocated: dict[int, torch.Tensor] = {}
        self.open: list[tuple[str, str]] = []
        self._next = 4096

    def allocate(self, num_bytes: int) -> int:
        self._next += LIMIT
        self.allocated[self._next] = torch.zeros(num_bytes, dtype=torch.uint8)
        return self._next


class Process:
    """Runtime (sync/device_memory.py) of one process, which sees the GPUs with these UUIDs."""

    def __init__(self, machine: Machine, uuids: list[str], fails: str = "") -> None:
        self._machine, self._uuids, self._fails = machine, uuids, fails
        self.calls: list[str] = []

    def uuids(self) -> list[str]:
        return self._uuids

    def allocate(self, num_bytes: int, device: int) -> int:
        if num_bytes > LIMIT:
            raise RuntimeError("out of memory")
        return self._machine.allocate(num_bytes)

    def free(self, address: int, device: int) -> None:
        assert not self._machine.open, "to free what others have open is undefined"
        del self._machine.allocated[address]

    def export(self, address: int, device: int) -> bytes:
        if self._fails == "export":
            raise RuntimeError("not supported")
        return address.to_bytes(64, "big")

    def open(self, handle: bytes, device: int) -> int:
        address = int.from_bytes(handle, "big")
        if address not in self._machine.allocated:
            raise RuntimeError("invalid handle")
        self._machine.open.append((self._uuids[device], handle.hex()))
        return address

    def close(self, address: int, device: int) -> None:
        self.calls.append("close")
        self._machine.open.remove((self._uuids[device], address.to_bytes(64, "big").hex()))

    def bytes_at(self, address: int, num_bytes: int, device: int) -> torch.Tensor:
        memory = self._machine.allocated[address]
        assert len(memory) == num_bytes
        return memory.view(-1)

    def synchronize(self, device: int) -> None:
        self.calls.append("synchronize")
