"""Memory that processes of one host share by a path: anonymous memory of the host here, that of a GPU in
device_memory.py.
"""

from __future__ import annotations

import mmap
import os
from typing import Protocol

import torch


class Memory(Protocol):
    """`bytes` that this process made or opened. After `close` nothing may look at them."""

    bytes: torch.Tensor

    def close(self) -> None: ...


class OwnMemory(Memory, Protocol):
    """`path`: what others open it by."""

    path: str


class MemoryKind(Protocol):
    """Where a rank stages weights."""

    def make(self, num_bytes: int) -> OwnMemory:
        """OSError when there is not enough."""
        ...

    def open(self, path: str, num_bytes: int) -> Memory:
        """What another process of this host has made. OSError or ValueError when it is not there."""
        ...

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Bytes for this process alone."""
        ...

    def synchronize(self) -> None:
        """Return when everything that was written is there for other processes to read."""
        ...


class HostMemory:
    """MemoryKind of memory of the host."""

    def make(self, num_bytes: int) -> StagingMemory:
        return StagingMemory(num_bytes)

    def open(self, path: str, num_bytes: int) -> MappedMemory:
        return MappedMemory(path, num_bytes)

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def synchronize(self) -> None:
        pass


class StagingMemory:
    """`bytes` of this process's own, which others of its host map by `path`: it leads through the open files
    of this process, so the memory is gone with the last process that has it open or mapped, also after
    kill -9. OSError when there is not enough.
    """

    def __init__(self, num_bytes: int) -> None:
        self._descriptor = os.memfd_create("megatron_dapo_weights")
        try:
            os.ftruncate(self._descriptor, num_bytes)
            self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
            self.bytes = map_memory(self.path, num_bytes)
        except BaseException:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        """What others have mapped is freed when they unmap it; ours with the last view of `bytes`."""
        del self.bytes
        os.close(self._descriptor)


class MappedMemory:
    """The `bytes` of another process's StagingMemory."""

    def __init__(self, path: str, num_bytes: int) -> None:
        self.bytes = map_memory(path, num_bytes)

    def close(self) -> None:
        del self.bytes


def map_memory(path: str, num_bytes: int) -> torch.Tensor:
    """The bytes of a StagingMemory of this host. OSError or ValueError when it is not there, or shorter."""
    with open(path, "r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=torch.uint8)
