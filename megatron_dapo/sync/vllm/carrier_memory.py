"""The memory in which a worker finds its chunks, open in the worker."""

from __future__ import annotations

import mmap
import os
import warnings

import torch

from megatron_dapo.sync.device_memory import PREFIX, OpenedDeviceMemory
from megatron_dapo.sync.manifest import Manifest


class CarrierMemory:
    """Of one carrier at a time. Memory of the host stays mapped from update to update: to map it anew would
    take as long as to read it.
    """

    def __init__(self) -> None:
        self._path, self._identity = "", None  # of what is open
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._device: OpenedDeviceMemory | None = None

    def chunk(self, manifest: Manifest) -> torch.Tensor:
        """The bytes of the chunk, without a copy; not to be written to. OSError if the memory is not there,
        ValueError if it is too short.
        """
        identity = _identity(manifest.path)
        if identity is None or identity != self._identity:
            self.close()
            self._open(manifest.path)
        end = manifest.offset + manifest.num_bytes
        if end > len(self._bytes):
            raise ValueError(
                f"Manifest.offset={manifest.offset}, num_bytes={manifest.num_bytes} must lie in the "
                f"{len(self._bytes)} bytes of {manifest.path}"
            )
        return self._bytes[manifest.offset : end]

    def release(self) -> None:
        """Between updates: close memory that is not its carrier's any more, and that of a GPU, which its
        owner may only free when nobody has it open.
        """
        if self._device or _identity(self._path) != self._identity:
            self.close()

    def close(self) -> None:
        self._path, self._identity = "", None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        device, self._device = self._device, None
        if device:
            device.close()

    def _open(self, path: str) -> None:
        if path.startswith(PREFIX):
            self._device = OpenedDeviceMemory(path)
            self._bytes = self._device.bytes
        else:
            self._bytes = _mapped(path)
        self._path, self._identity = path, _identity(path)


def _identity(path: str) -> object:
    """Another one for memory that a carrier makes later, though its path may be the same. None: there is
    nothing.
    """
    if path.startswith(PREFIX):
        return path
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _mapped(path: str) -> torch.Tensor:
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=torch.uint8)
