"""Memory of a GPU that processes of one host share, as sync/staging_memory.py does with memory of the host.

Its name, which a manifest carries, is "cuda:UUID/BYTES/HANDLE": the GPU by its UUID, since processes number
those they see in their own ways, and CUDA's interprocess handle in hexadecimal digits. The memory does not
come from torch's allocator, whose blocks cannot always be exported.

What only a GPU can run is `Cuda`; tests put another `runtime` in its place.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch

from megatron_dapo.errors import UserError

PREFIX = "cuda:"
HANDLE_BYTES = 64  # cudaIpcMemHandle_t
LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess: also for ranks whose own GPU is another one


class Runtime(Protocol):
    """Of addresses and GPUs, which are numbered as this process sees them. RuntimeError when a call fails."""

    def uuids(self) -> list[str]: ...

    def allocate(self, num_bytes: int, device: int) -> int: ...

    def free(self, address: int, device: int) -> None: ...

    def export(self, address: int, device: int) -> bytes: ...

    def open(self, handle: bytes, device: int) -> int: ...

    def close(self, address: int, device: int) -> None: ...

    def bytes_at(self, address: int, num_bytes: int, device: int) -> torch.Tensor: ...

    def synchronize(self, device: int) -> None: ...


class GpuMemory:
    """MemoryKind (sync/staging_memory.py) of this process's GPU `device`."""

    def __init__(self, device: torch.device, runtime: Runtime | None = None) -> None:
        self._device, self._number = device, device.index or 0
        self._runtime = runtime or Cuda()

    def make(self, num_bytes: int) -> DeviceMemory:
        return DeviceMemory(num_bytes, self._number, self._runtime)

    def open(self, path: str, num_bytes: int) -> OpenedDeviceMemory:
        return OpenedDeviceMemory(path, self._runtime)

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def synchronize(self) -> None:
        self._runtime.synchronize(self._number)


class DeviceMemory:
    """`bytes` on this process's GPU number `device`, which others of its host open by `path`. OSError when
    there is not enough.
    """

    def __init__(self, num_bytes: int, device: int, runtime: Runtime | None = None) -> None:
        self._runtime, self._device = runtime or Cuda(), device
        self._address = 0
        try:
            self._address = self._runtime.allocate(num_bytes, device)
            handle = self._runtime.export(self._address, device)
        except RuntimeError as error:
            if self._address:
                self._runtime.free(self._address, device)
            raise OSError(f"{num_bytes} bytes on GPU {device}: {error}") from error
        self.path = f"{PREFIX}{self._runtime.uuids()[device]}/{num_bytes}/{handle.hex()}"
        self.bytes = self._runtime.bytes_at(self._address, num_bytes, device)

    def close(self) -> None:
        """Others must have closed it: to free what they have open is undefined."""
        del self.bytes
        self._runtime.free(self._address, self._device)


class OpenedDeviceMemory:
    """`bytes` of the DeviceMemory of another process of this host. UserError when this process does not see
    its GPU, OSError when it is not there any more, ValueError for a path that is none.
    """

    def __init__(self, path: str, runtime: Runtime | None = None) -> None:
        self._runtime = runtime or Cuda()
        uuid, num_bytes, handle = _parsed(path)
        uuids = self._runtime.uuids()
        if uuid not in uuids:
            raise UserError(
                f"weights lie on GPU {uuid}, and this process sees {', '.join(uuids) or 'none'}; ranks and "
                f"engines of a colocated run need the same GPUs in CUDA_VISIBLE_DEVICES"
            )
        self._device = uuids.index(uuid)
        try:
            self._address = self._runtime.open(handle, self._device)
        except RuntimeError as error:
            raise OSError(f"{path[:80]}: {error}") from error
        self.bytes = self._runtime.bytes_at(self._address, num_bytes, self._device)

    def close(self) -> None:
        """Waits for what this process still reads or writes there; nothing may look at `bytes` afterwards."""
        self._runtime.synchronize(self._device)
        del self.bytes
        self._runtime.close(self._address, self._device)


def _parsed(path: str) -> tuple[str, int, bytes]:
    """(UUID, bytes, handle) of a path."""
    try:
        uuid, num_bytes, handle = path.removeprefix(PREFIX).split("/")
        parsed = uuid, int(num_bytes), bytes.fromhex(handle)
    except ValueError as error:
        raise ValueError(f"{path[:100]!r} does not name memory of a GPU: {error}") from error
    if not path.startswith(PREFIX) or parsed[1] < 1 or len(parsed[2]) != HANDLE_BYTES:
        raise ValueError(f"{path[:100]!r} must be cuda:UUID/BYTES/HANDLE with {2 * HANDLE_BYTES} digits")
    return parsed


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t, which CUDA's functions take by value."""

    _fields_ = [("reserved", ctypes.c_byte * HANDLE_BYTES)]


class Cuda:
    """The CUDA runtime library that torch has loaded into this process."""

    def __init__(self) -> None:
        major = (torch.version.cuda or "none").partition(".")[0]
        try:
            self._library = ctypes.CDLL(f"libcudart.so.{major}")
        except OSError as error:
            raise UserError(f"memory of a GPU cannot be shared without CUDA's runtime: {error}") from error
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def uuids(self) -> list[str]:
        return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]

    def allocate(self, num_bytes: int, device: int) -> int:
        address = ctypes.c_void_p()
        self._call("cudaMalloc", device, ctypes.byref(address), ctypes.c_size_t(num_bytes))
        return address.value or 0

    def free(self, address: int, device: int) -> None:
        self._call("cudaFree", device, ctypes.c_void_p(address))

    def export(self, address: int, device: int) -> bytes:
        handle = _Handle()
        self._call("cudaIpcGetMemHandle", device, ctypes.byref(handle), ctypes.c_void_p(address))
        return bytes(handle.reserved)

    def open(self, handle: bytes, device: int) -> int:
        address, known = ctypes.c_void_p(), _Handle.from_buffer_copy(handle)
        flags = ctypes.c_uint(LAZY_PEER_ACCESS)
        self._call("cudaIpcOpenMemHandle", device, ctypes.byref(address), known, flags)
        return address.value or 0

    def close(self, address: int, device: int) -> None:
        self._call("cudaIpcCloseMemHandle", device, ctypes.c_void_p(address))

    def bytes_at(self, address: int, num_bytes: int, device: int) -> torch.Tensor:
        return torch.as_tensor(_Bytes(address, num_bytes), device=f"cuda:{device}")

    def synchronize(self, device: int) -> None:
        torch.cuda.synchronize(device)

    def _call(self, name: str, device: int, *arguments: Any) -> None:
        with torch.cuda.device(device):
            if code := getattr(self._library, name)(*arguments):
                raise RuntimeError(f"{name}: {self._library.cudaGetErrorString(code).decode()}")


class _Bytes:
    """Memory as torch takes it without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
            "version": 3,
            "strides": None,
        }
