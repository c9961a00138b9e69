"""Rows of tensors that lie in pieces of files, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_dapo.convert.tensors import Block, Reader, Stored, stacked
from megatron_dapo.errors import UserError

LEFT, RIGHT = torch.arange(6.0).view(3, 2), torch.arange(100.0, 103).view(3, 1)


@pytest.fixture
def columns(tmp_path) -> Stored:
    """[3, 3], the first two columns in one file and the last in another, behind 4 and 8 other bytes."""
    for name, skip, tensor in (("left", 4, LEFT), ("right", 8, RIGHT)):
        (tmp_path / name).write_bytes(b"\xff" * skip + tensor.numpy().tobytes())
    blocks = (Block(tmp_path / "left", 4, 3, 2), Block(tmp_path / "right", 8, 3, 1, at_column=2))
    return Stored((3, 3), torch.float32, blocks)


def test_columns_of_two_files(columns):
    whole = torch.cat([LEFT, RIGHT], dim=1)
    reader = Reader()
    assert torch.equal(reader.read("x", columns, 0, 3), whole)
    assert torch.equal(reader.read("x", columns, 1, 2), whole[1:])
    pieces = list(reader.pieces("x", columns, piece_bytes=2 * columns.row_bytes))
    assert [len(piece) for piece in pieces] == [2, 1] and torch.equal(torch.cat(pieces), whole)
    reader.close()


def test_rows_of_tensors_below_each_other(columns):
    whole, reader = torch.cat([LEFT, RIGHT], dim=1), Reader()
    made = stacked([(columns, 1, 2), (columns, 0, 1), (columns, 2, 1)])
    assert made.shape == (4, 3) and made.covered
    assert torch.equal(reader.read("x", made, 0, 4), whole[[1, 2, 0, 2]])
    again = stacked([(made, 1, 2)])
    assert torch.equal(reader.read("x", again, 0, 2), whole[[2, 0]])


def test_what_does_not_make_a_whole_is_not_covered(columns):
    first, last = columns.blocks
    assert columns.covered and columns.num_bytes == 36
    assert not Stored((3, 3), torch.float32, (first,)).covered
    assert not Stored((3, 2), torch.float32, (last, last, last)).covered  # outside, the sum is right
    assert not Stored((2, 3), torch.float32, (first,)).covered


def test_a_file_that_ends_too_early_is_named_with_the_tensor(columns):
    file = columns.blocks[0].file
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{file} is cut short inside tensor decoder\.x"):
        Reader().read("decoder.x", columns, 0, 3)


def test_a_missing_file_is_named():
    gone = Stored((1,), torch.float32, (Block(Path("/no/such"), 0, 1, 1),))
    with pytest.raises(UserError, match="/no/such cannot be read: No such file"):
        Reader().read("x", gone, 0, 1)
