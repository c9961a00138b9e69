"""Differences by name, number of elements and size, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_dapo.convert.compare import as_json, as_text, compare
from megatron_dapo.errors import UserError

TENSORS = {"a": torch.arange(8.0).view(4, 2), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(2)}


def folder(path: Path, **changed: torch.Tensor | None) -> Path:
    path.mkdir()
    tensors = {name: tensor for name, tensor in (TENSORS | changed).items() if tensor is not None}
    save_file(tensors, path / "model.safetensors")
    return path


def test_equal(tmp_path):
    result = compare(folder(tmp_path / "a"), folder(tmp_path / "b"))
    assert result.equal and result.num_tensors == 3
    assert as_text(result) == "3 of 3 tensors are equal in every bit"


@pytest.mark.parametrize("workers", [1, 2])
def test_differences(tmp_path, workers):
    a = TENSORS["a"].clone()
    a[1, 1], a[3, 0] = 3.5, 4.0  # were 3 and 6
    changed = folder(tmp_path / "b", a=a, b=None, d=torch.ones(1))
    result = compare(folder(tmp_path / "a"), changed, workers=workers)
    [difference] = result.differences
    assert (difference.name, difference.elements, difference.largest) == ("a", 2, 2.0)
    assert (result.only_a, result.only_b, result.equal) == (("b",), ("d",), False)
    assert as_text(result).splitlines() == [
        "a: 2 elements, largest difference 2",
        "b: only in the first",
        "d: only in the second",
        "1 of 2 tensors are equal in every bit",
    ]
    assert as_json(result)["different"][0]["largest"] == 2.0


def test_bits_types_and_shapes(tmp_path):
    c = torch.tensor([-0.0, 0.0])
    b = TENSORS["b"].float()
    result = compare(folder(tmp_path / "a"), folder(tmp_path / "b", a=torch.zeros(4, 3), b=b, c=c))
    found = {d.name: d for d in result.differences}
    assert (found["c"].elements, found["c"].largest) == (1, 0.0)  # -0 has other bits
    assert (found["b"].elements, found["b"].dtypes) == (0, ("bfloat16", "float32"))
    assert found["a"].shapes == ((4, 2), (4, 3))


def test_nan_equals_nan_and_nothing_else(tmp_path):
    nan = torch.tensor([float("nan"), 0.0])
    assert compare(folder(tmp_path / "a", c=nan), folder(tmp_path / "b", c=nan)).equal
    [difference] = compare(tmp_path / "a", folder(tmp_path / "c")).differences
    assert difference.elements == 1 and math.isnan(difference.largest)


def test_a_model_that_nobody_knows(tmp_path):
    from test_torch_dist_folder import like_megatron, write

    with pytest.raises(UserError, match=r"no config\.json of the model; give --hf-source"):
        compare(folder(tmp_path / "a"), write(tmp_path / "b", like_megatron()))
