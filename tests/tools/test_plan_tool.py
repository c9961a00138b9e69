"""The command line of tools/plan.py: what it prints for the shipped configurations, and its refusals.

vLLM's tables are replaced by such made by hand, but in the slow test.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
from support.planning import engine_table

from megatron_dapo.model_spec import read_model
from megatron_dapo.rollout.simulate_model import KNOWN
from megatron_dapo.weights.names import hf_shapes

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
COLOCATED = ["sync", "--config", str(CONFIGS / "qwen32b.yaml"), "--json"]
DISAGGREGATED = ["sync", "--config", str(CONFIGS / "qwen32b_async.yaml"), "--engine-hosts", "12", "--json"]
SHARD_BYTES = 2 * 8_191_464_448  # bf16, a quarter of the 32B model


@pytest.fixture(scope="module")
def real_tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
        yield importlib.import_module("plan")


@pytest.fixture
def tool(real_tool, monkeypatch):
    def by_hand(config, folder, model):
        tp, dtype = config.rollout.tensor_parallel, {"bf16": "bfloat16", "fp32": "float32"}
        return [engine_table(model, tp=tp, tp_rank=t, dtype=dtype[config.model.dtype]) for t in range(tp)]

    monkeypatch.setattr(importlib.import_module("plans.sync"), "engine_tables", by_hand)
    return real_tool


def check_colocated(result):
    assert (result["hosts"], result["ranks"], result["engines"], result["workers"]) == (16, 128, 32, 128)
    assert result["received_by_worker"]["each"] == [SHARD_BYTES] * 128 and result["ratio_bytes"] == 1.0
    sizes = result["bytes"]
    assert sizes["total"] == 128 * SHARD_BYTES == sum(sizes.values()) - sizes["total"]
    # a pipeline stage lies on four hosts: the other three quarters of an engine come from elsewhere
    assert sizes["between_hosts"] / sizes["total"] == pytest.approx(0.75, abs=0.01)
    assert result["sent_by_rank"]["max_over_mean"] <= 1.1
    least = sizes["between_hosts"] / 128 / result["bandwidths"]["between_hosts"]
    assert least <= result["seconds"]["between_hosts"] <= 1.3 * least


def check_disaggregated(result):
    assert (result["hosts"], result["ranks"], result["engines"], result["workers"]) == (16, 32, 24, 96)
    assert result["bytes"] == {
        "same_rank": 0,
        "inside_host": 0,
        "between_hosts": 96 * SHARD_BYTES,
        "total": 96 * SHARD_BYTES,
    }
    assert result["received_by_worker"]["each"] == [SHARD_BYTES] * 96
    assert result["sent_by_rank"]["max_over_mean"] <= 1.1


@pytest.mark.parametrize(
    ("arguments", "check"), [(COLOCATED, check_colocated), (DISAGGREGATED, check_disaggregated)]
)
def test_the_flagship(tool, capsys, arguments, check):
    assert tool.main(arguments) == 0
    check(json.loads(capsys.readouterr().out))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "check"), [(COLOCATED, check_colocated), (DISAGGREGATED, check_disaggregated)]
)
def test_the_flagship_with_the_tables_of_vllm(real_tool, capsys, arguments, check):
    assert real_tool.main(arguments) == 0
    check(json.loads(capsys.readouterr().out))


@pytest.mark.slow
def test_the_flagship_with_engines_in_block_fp8(real_tool, capsys):
    assert real_tool.main([*COLOCATED, "rollout.quantization=fp8_block"]) == 0
    result = json.loads(capsys.readouterr().out)
    # a quarter of embedding, head and biases, and all norms
    kept = (2 * 152064 * 5120 + 64 * (5120 + 2 * 1024)) // 4 + (2 * 64 + 1) * 5120
    in_fp8 = SHARD_BYTES // 2 - kept
    shard_bytes = 2 * kept + in_fp8 + in_fp8 // 128**2 * 4
    assert result["received_by_worker"]["each"] == [shard_bytes] * 128 and result["ratio_bytes"] == 1.0
    assert shard_bytes / SHARD_BYTES == pytest.approx(0.524, abs=0.001)


@pytest.mark.parametrize(
    "config",
    [
        # 18,867 tensors in the engines' tables
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem == "qwen3_30b_a3b" else ())
        for path in sorted(CONFIGS.glob("*.yaml"))
    ],
)
def test_every_shipped_configuration_is_planned_without_model_files(
    tool, capsys, monkeypatch, tmp_path, config
):
    monkeypatch.chdir(tmp_path)
    assert tool.main(["sync", "--config", str(config)]) == 0
    text = capsys.readouterr().out
    assert "1.000 x its shard" in text and "between hosts" in text and "planned, not measured" in text


@pytest.mark.parametrize(
    ("name", "published"),
    [
        *((name, KNOWN[name][0].params) for name in ("Qwen2.5-32B", "smollm2")),
        ("Qwen2.5-1.5B", 1.5437e9),
        ("Qwen2.5-7B", 7.6156e9),  # of the weights on the hub
        ("Qwen3-30B-A3B", 30.532e9),
    ],
)
def test_a_kept_config_file_has_the_published_number_of_parameters(tool, name, published):
    with importlib.import_module("plans.models").model_folder(f"nowhere/{name}") as folder:
        shapes = hf_shapes(read_model(folder))
    assert sum(map(math.prod, shapes.values())) == pytest.approx(published, rel=0.001)


def test_the_kept_config_file_of_the_tiny_base_is_that_of_its_maker(tool, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import make_tiny_base

    made = make_tiny_base.make_model(make_tiny_base.make_tokenizer()).config.to_dict()
    kept = json.loads((ROOT / "tools" / "model_configs" / "tiny_base.json").read_text())
    for key in kept.keys() - {"architectures", "torch_dtype", "rope_theta"}:
        assert kept[key] == made[key], key
    assert made["rope_parameters"]["rope_theta"] == kept["rope_theta"]


def test_overrides_bandwidths_and_chunks(tool, capsys):
    tiny = ["sync", "--config", str(CONFIGS / "tiny.yaml"), "rollout.engines=3", "layout.data_parallel=2"]
    options = ["--json", "--gpus-per-host", "1", "--between-hosts", "2", "sync.chunk_bytes=1000000"]
    assert tool.main([*tiny, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["hosts"], result["engines"]) == (2, 6)  # three on each host
    assert result["bandwidths"]["between_hosts"] == 2e9 and result["chunk_bytes"] == 1_000_000
    assert result["rounds"] >= result["shard_by_worker"]["max"] / 1_000_000
    assert result["planning_seconds"].keys() == {"sink_tables", "plan"}
    assert result["manifest_bytes"]["later_pushes"] < 0.5 * result["manifest_bytes"]["first_push"]


def test_a_model_that_nothing_is_known_of(tool, capsys):
    tiny = ["sync", "--config", str(CONFIGS / "tiny.yaml"), "model.path=some/other"]
    assert tool.main(tiny) == 2
    assert "none is kept for other, only for Qwen2.5-1.5B, Qwen2.5-32B" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ("--engine-hosts=-1", "at least 0"),
        ("--gpus-per-host=0", "at least 1"),
        ("--between-hosts=0", "above 0"),
    ],
)
def test_a_number_out_of_bounds_is_refused(tool, capsys, option, rule):
    with pytest.raises(SystemExit):
        tool.main(["sync", "--config", str(CONFIGS / "tiny.yaml"), option])
    assert f"{option.split('=')[0]} " in (err := capsys.readouterr().err) and rule in err


@pytest.mark.parametrize("wrong", ["--gpu=8", "layout", "-x"])
def test_a_wrong_argument_is_named(tool, capsys, wrong):
    with pytest.raises(SystemExit):
        tool.main(["sync", "--config", str(CONFIGS / "tiny.yaml"), wrong])
    assert f"{wrong} is neither an option nor of the form section.key=value" in capsys.readouterr().err
