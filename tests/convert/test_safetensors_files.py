"""Headers of safetensors files, against the library; what is wrong with a file names it and the tensor."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dapo.convert.safetensors_files import header, read_folder, read_header
from megatron_dapo.convert.tensors import Reader
from megatron_dapo.errors import UserError

TENSORS = {"a": torch.arange(6.0).view(2, 3).bfloat16(), "b.c": torch.arange(4.0), "d": torch.zeros(2, 0)}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_file_of_the_library_is_read(file):
    found, reader = read_folder(file.parent), Reader()
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name, found[name], 0, len(tensor)), tensor)


def test_the_library_reads_a_header_of_ours(file):
    data = header({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()})
    data += b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in TENSORS.values())
    file.write_bytes(data)
    loaded = load_file(file)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_a_file_that_is_cut_short_names_the_tensor(file):
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"{file} is cut short: tensor a ends at byte"):
        read_folder(file.parent)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short"),
        (b"\x00" * 4, "cut short"),
        (struct.pack("<Q", 1 << 40) + b"{}", "no safetensors file"),
        (struct.pack("<Q", 3) + b"{a}", "header is not JSON"),
        (struct.pack("<Q", 12) + b'{"a": {"x":1}}'[:12], "header is not JSON"),
    ],
)
def test_damaged_headers(file, data, message):
    file.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_header(file)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2]}, "no place of tensor a"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}, r"tensor a \[2\] F32 has 7 bytes"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}, "tensor a is F4; supported"),
    ],
)
def test_damaged_entries_name_the_tensor(file, entry, message):
    text = json.dumps({"a": entry}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\x00" * 8)
    with pytest.raises(UserError, match=message):
        read_header(file)


def test_an_index_that_points_to_the_wrong_file(file):
    index = file.parent / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file.name, "gone": file.name}}))
    with pytest.raises(UserError, match=rf"{file} has no tensor gone, which the index puts there"):
        read_folder(file.parent)
    index.write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    with pytest.raises(UserError, match=r"other\.safetensors cannot be read: No such file"):
        read_folder(file.parent)
