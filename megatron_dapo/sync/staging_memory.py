"""Anonymous memory that processes of one host share by a path."""

from __future__ import annotations

import mmap
import os

import torch


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


def map_memory(path: str, num_bytes: int) -> torch.Tensor:
    """The bytes of a StagingMemory of this host. OSError or ValueError when it is not there, or shorter."""
    with open(path, "r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=torch.uint8)
