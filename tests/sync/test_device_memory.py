"""Memory of a GPU between two processes: here both ends in one, on a runtime that only keeps a list."""

from __future__ import annotations

import re

import pytest
import torch
from support.device_memory import Machine, Process

from megatron_dapo.errors import UserError
from megatron_dapo.sync.device_memory import Cuda, DeviceMemory, OpenedDeviceMemory, _Bytes, _Handle


def test_what_one_writes_the_other_reads_though_they_number_gpus_differently():
    machine = Machine()
    trainer, engine = Process(machine, ["u0", "u1", "u2"]), Process(machine, ["u1", "u2"])
    own = DeviceMemory(16, 2, trainer)
    assert re.fullmatch(r"cuda:u2/16/[0-9a-f]{128}", own.path)
    seen = OpenedDeviceMemory(own.path, engine)
    own.bytes.copy_(torch.arange(16))
    assert seen.bytes.tolist() == list(range(16))
    assert machine.open == [("u2", own.path[-128:])]


def test_everything_is_given_back_and_closed_after_waiting_for_what_still_reads():
    machine = Machine()
    trainer, engine = Process(machine, ["u0"]), Process(machine, ["u0"])
    for _ in range(3):
        own = DeviceMemory(16, 0, trainer)
        seen = OpenedDeviceMemory(own.path, engine)
        seen.close()
        own.close()
    assert machine.open == [] and machine.allocated == {}
    assert engine.calls[-2:] == ["synchronize", "close"]


def test_errors_say_what_is_missing():
    machine = Machine()
    trainer = Process(machine, ["u0"])
    own = DeviceMemory(16, 0, trainer)
    with pytest.raises(UserError, match=r"weights lie on GPU u0, and this process sees u3, u4; .*VISIBLE"):
        OpenedDeviceMemory(own.path, Process(machine, ["u3", "u4"]))
    own.close()
    with pytest.raises(OSError, match=r"cuda:u0/16/.*: invalid handle"):
        OpenedDeviceMemory(own.path, trainer)
    with pytest.raises(OSError, match="17179869184 bytes on GPU 0: out of memory"):
        DeviceMemory(1 << 34, 0, trainer)


@pytest.mark.parametrize(
    "path", ["cuda:u0", "cuda:u0/16/zz", "cuda:u0/x/00", "cuda:u0/16/00", "/proc/1/fd/3"]
)
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(ValueError, match=r"does not name memory of a GPU|must be cuda:UUID/BYTES/HANDLE"):
        OpenedDeviceMemory(path, Process(Machine(), ["u0"]))


def test_a_process_without_the_runtime_says_so(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"without CUDA's runtime: libcudart\.so\.none"):
        Cuda()


def test_handles_and_addresses_as_c_and_torch_take_them():
    handle = bytes(range(192, 256))
    assert bytes(_Handle.from_buffer_copy(handle).reserved) == handle
    interface = _Bytes(4096, 16).__cuda_array_interface__
    assert interface["data"] == (4096, False) and interface["shape"] == (16,)


def test_memory_that_cannot_be_exported_is_given_back():
    machine = Machine()
    with pytest.raises(OSError, match="16 bytes on GPU 0: not supported"):
        DeviceMemory(16, 0, Process(machine, ["u0"], fails="export"))
    assert machine.allocated == {}
