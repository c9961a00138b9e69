"""How sync/device_memory.py calls CUDA's library, on a small one in C with the same functions: addresses, the
handle that is passed by value, flags, and what an error says. (The real one: tests/gpu/test_gpu_memory.py.)
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess

import pytest
import torch

from megatron_dapo.errors import UserError
from megatron_dapo.sync import device_memory
from megatron_dapo.sync.device_memory import HANDLE_BYTES, Cuda, _Bytes

LIBRARY = """
#include <stdlib.h>
#include <string.h>
typedef struct { char reserved[64]; } cudaIpcMemHandle_t;
int cudaMalloc(void **address, size_t size) { return (*address = size > 1000 ? 0 : malloc(size)) ? 0 : 2; }
int cudaFree(void *address) { free(address); return 0; }
int cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *address) {
  memset(handle, 7, sizeof *handle);
  memcpy(handle->reserved, &address, sizeof address);
  return 0;
}
int cudaIpcOpenMemHandle(void **address, cudaIpcMemHandle_t handle, unsigned flags) {
  if (flags != 1 || handle.reserved[63] != 7) return 1;
  memcpy(address, handle.reserved, sizeof *address);
  return 0;
}
int cudaIpcCloseMemHandle(void *address) { return 0; }
const char *cudaGetErrorString(int code) { return code == 2 ? "out of memory" : "invalid argument"; }
"""


@pytest.fixture
def cuda(tmp_path, monkeypatch) -> Cuda:
    if not (compiler := shutil.which("cc")):
        pytest.skip("there is no C compiler")
    (tmp_path / "cudart.c").write_text(LIBRARY)
    command = [compiler, "-shared", "-fPIC", "-o", str(tmp_path / "cudart.so"), str(tmp_path / "cudart.c")]
    subprocess.run(command, check=True)
    load = ctypes.CDLL

    def opened(name: str) -> ctypes.CDLL:
        assert name == "libcudart.so.13"
        return load(str(tmp_path / "cudart.so"))

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device_memory.ctypes, "CDLL", opened)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return Cuda()


def test_memory_is_found_again_by_its_handle(cuda):
    address = cuda.allocate(100, 0)
    ctypes.memset(address, 5, 100)
    handle = cuda.export(address, 0)
    assert len(handle) == HANDLE_BYTES
    assert cuda.open(handle, 0) == address
    assert ctypes.string_at(address, 100) == b"\x05" * 100
    cuda.close(address, 0)
    cuda.free(address, 0)


def test_an_error_names_the_call_and_what_cuda_says(cuda):
    with pytest.raises(RuntimeError, match="cudaMalloc: out of memory"):
        cuda.allocate(1001, 0)
    with pytest.raises(RuntimeError, match="cudaIpcOpenMemHandle: invalid argument"):
        cuda.open(b"\x00" * HANDLE_BYTES, 0)


def test_no_library_is_said(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "0.7")
    with pytest.raises(UserError, match="libcudart.so.0"):
        Cuda()


def test_bytes_are_described_as_torch_takes_them():
    described = _Bytes(4096, 7).__cuda_array_interface__
    assert described["data"] == (4096, False) and described["shape"] == (7,) and described["typestr"] == "|u1"
