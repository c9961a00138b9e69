"""Runtimes of GPUs that are not there: memory of the host under addresses that a list knows."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_dapo.sync.staging_memory import StagingMemory, map_memory

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


class ProcessOfMany:
    """Runtime (sync/device_memory.py) of a process among others: memory of the host stands for that of a GPU.
    What processes have open is noted in `folder`; to free it raises.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: dict[int, StagingMemory] = {}  # by address
        self._opened: dict[int, str] = {}  # paths by address
        self.num_synchronized = 0

    def uuids(self) -> list[str]:
        return ["gpu"]

    def allocate(self, num_bytes: int, device: int) -> int:
        memory = StagingMemory(num_bytes)
        address = memory.bytes.data_ptr()
        self._own[address] = memory
        return address

    def free(self, address: int, device: int) -> None:
        memory = self._own.pop(address)
        if left := list(self._folder.glob(f"{_file_name(memory.path)} *")):
            raise AssertionError(f"to free what others have open is undefined: {left}")
        memory.close()

    def export(self, address: int, device: int) -> bytes:
        return self._own[address].path.encode().ljust(64, b"\0")

    def open(self, handle: bytes, device: int) -> int:
        path, address = handle.rstrip(b"\0").decode(), 1 + max(self._opened, default=0)
        self._opened[address] = path
        (self._folder / f"{_file_name(path)} {os.getpid()} {address}").touch()
        return address

    def close(self, address: int, device: int) -> None:
        path = self._opened.pop(address)
        (self._folder / f"{_file_name(path)} {os.getpid()} {address}").unlink()

    def bytes_at(self, address: int, num_bytes: int, device: int) -> torch.Tensor:
        path = self._opened[address] if address in self._opened else self._own[address].path
        return map_memory(path, num_bytes)

    def synchronize(self, device: int) -> None:
        self.num_synchronized += 1


def _file_name(path: str) -> str:
    return path.strip("/").replace("/", "_")
