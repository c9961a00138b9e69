"""torch.save's files without torch.load: places of tensors, plain values, and nothing that is run."""

from __future__ import annotations

import argparse
import enum
import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from megatron_dapo.convert.tensors import Block, Item, Reader, Stored
from megatron_dapo.convert.torch_files import SavedTensor, Unknown, read_pickle, read_torch_file
from megatron_dapo.errors import UserError


class Color(enum.Enum):
    RED = 1


class Runs:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def test_tensors_of_every_type_lie_where_it_says(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {str(dtype): base.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    tensors |= {"rows": base[1:3], "columns": base[:, 1:3], "parameter": torch.nn.Parameter(base * 2)}
    torch.save(tensors, tmp_path / "file")
    found, data = read_torch_file(tmp_path / "file"), (tmp_path / "file").read_bytes()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        saved = found[name]
        assert isinstance(saved, SavedTensor)
        assert (saved.shape, saved.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert saved.contiguous == (name != "columns")
        if saved.contiguous:
            size = tensor.numel() * tensor.dtype.itemsize
            held = torch.frombuffer(bytearray(data[saved.start : saved.start + size]), dtype=tensor.dtype)
            assert torch.equal(held.view(tensor.shape), tensor.detach()), name


def test_plain_values_and_strangers(tmp_path):
    args = argparse.Namespace(tensor_model_parallel_size=2, color=Color.RED, names=["a"], size=(1, 2))
    torch.save({"args": args, "state": io.BytesIO(b"x"), "step": 7}, tmp_path / "file")
    found = read_torch_file(tmp_path / "file")
    assert found["step"] == 7 and isinstance(found["state"], Unknown)
    assert (found["args"].tensor_model_parallel_size, found["args"].names, found["args"].size) == (
        2,
        ["a"],
        (1, 2),
    )
    assert isinstance(found["args"].color, Unknown)


def test_a_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save([Runs()], tmp_path / "file")
    (tmp_path / "plain").write_bytes(pickle.dumps(Runs()))
    assert isinstance(read_torch_file(tmp_path / "file")[0], Unknown)
    assert isinstance(read_pickle(tmp_path / "plain"), Unknown)
    assert not (tmp_path / "made-by-a-pickle").exists()


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 500]
)
def test_damaged_files_are_named(tmp_path, damage):
    torch.save({"x": torch.zeros(8)}, tmp_path / "file")
    (tmp_path / "file").write_bytes(damage((tmp_path / "file").read_bytes()))
    with pytest.raises(UserError, match=rf"{tmp_path / 'file'} is cut short, damaged"):
        read_torch_file(tmp_path / "file")
    with pytest.raises(UserError, match=rf"{tmp_path / 'file'} is damaged"):
        read_pickle(tmp_path / "file")


@pytest.fixture
def item(tmp_path) -> tuple[Path, Stored]:
    """A tensor that torch.save wrote in the middle of a file."""
    stream = io.BytesIO(b"before" * 3)
    stream.seek(0, io.SEEK_END)
    begin = stream.tell()
    torch.save(torch.arange(1000.0).view(100, 10), stream)
    length = stream.tell() - begin
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(stream.getvalue() + b"behind")
    block = Block(file, 0, 100, 10, item=Item(begin, length, 4000))
    return file, Stored((100, 10), torch.float32, (block,))


def test_an_item_of_a_file_is_read_by_rows(item):
    assert torch.equal(Reader().read("x", item[1], 30, 5), torch.arange(1000.0).view(100, 10)[30:35])


def test_one_wrong_bit_is_found_and_the_tensor_named(item):
    file, tensor = item
    data = bytearray(file.read_bytes())
    data[data.index(torch.tensor([500.0, 501.0]).numpy().tobytes())] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{file} is damaged: the checksum of tensor a\.b is wrong"):
        Reader().read("a.b", tensor, 0, 1)


def test_an_item_of_another_size_is_refused(item):
    file, tensor = item
    [block] = tensor.blocks
    wrong = Stored(
        (50, 10),
        torch.float32,
        (Block(file, 0, 50, 10, item=Item(block.item.offset, block.item.length, 2000)),),
    )
    with pytest.raises(UserError, match=r"tensor x has 4000 bytes, not the 2000 that \.metadata says"):
        Reader().read("x", wrong, 0, 1)
    cut = Stored(
        (100, 10), torch.float32, (Block(file, 0, 100, 10, item=Item(block.item.offset, 2000, 4000)),)
    )
    with pytest.raises(UserError, match=rf"{file} is damaged or cut short at tensor x"):
        Reader().read("x", cut, 0, 1)
