"""Checkpoints that Megatron saved at some layout come back as the Hugging Face checkpoint they were made of,
bit for bit, and Megatron loads a converted one at that layout.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.convert_runs import FAMILIES, Measured, assert_bit_equal, measure, weights

from megatron_dapo.convert import compare, workers
from megatron_dapo.convert.describe import describe
from megatron_dapo.convert.job import Job

FAST = ("odd_vocab", "experts", "interleaved")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
FORMATS = ("torch_dist", "singleton", "legacy")


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> Measured:
    return measure(tmp_path_factory.mktemp("fast"), FAST)


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Measured:
    return measure(tmp_path_factory.mktemp("slow"), tuple(name for name in FAMILIES if name not in FAST))


@pytest.fixture
def measured(request, name) -> Measured:
    return request.getfixturevalue("fast" if name in FAST else "slow")


def to_hf(source: Path, model: Path, out: Path, **changed) -> Path:
    workers.convert(Job(to="hf", source=source, hf_source=model, out=out, **changed), environment={})
    return out


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_what_megatron_saved_is_the_checkpoint_it_was_made_of(measured, name, form, tmp_path):
    out = to_hf(measured.saved[name] / form, measured.models[name], tmp_path / "hf", shard_bytes=100_000)
    assert_bit_equal(weights(out), weights(measured.models[name]))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights(out).keys()
    assert len(set(index["weight_map"].values())) > 2


@pytest.mark.parametrize("name", NAMES)
def test_megatron_loads_a_converted_checkpoint(measured, name):
    assert_bit_equal(weights(measured.loaded[name]), weights(measured.models[name]))


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_checkpoint_converts_back(measured, name, tmp_path):
    out = to_hf(measured.converted[name], measured.models[name], tmp_path / "hf")
    assert_bit_equal(weights(out), weights(measured.models[name]))


@pytest.mark.parametrize("name", NAMES)
def test_verify_across_formats_and_layouts(measured, name):
    model, saved = measured.models[name], measured.saved[name]
    for a, b in ((saved / "torch_dist", model), (measured.converted[name], saved / "legacy")):
        result = compare.compare(a, b)
        assert result.equal and result.num_tensors == len(weights(model))
    without_model = compare.compare(saved / "singleton", saved / "torch_dist")
    assert without_model.equal and without_model.num_tensors < len(weights(model))  # q, k and v are one


@pytest.mark.parametrize("name", NAMES)
def test_inspect(measured, name):
    layout = FAMILIES[name].layout
    facts = describe(measured.saved[name] / "legacy")
    assert facts["step"] == 7 and facts["format"] == "Megatron mp_rank_*"
    assert facts["layout"]["tp"] == (2 if "tp2" in layout else 1) and facts["layout"]["pp"] == 2
    assert describe(measured.saved[name] / "torch_dist")["layout"]["tp"] == facts["layout"]["tp"]
    facts, model = describe(measured.converted[name]), weights(measured.models[name])
    assert facts["parameters"] == sum(tensor.numel() for tensor in model.values())
    assert facts["weight_bytes"] == 4 * facts["parameters"] and facts["dtypes"].keys() == {"float32"}
    assert (
        facts["architecture"]
        == json.loads((measured.models[name] / "config.json").read_text())["architectures"][0]
    )
