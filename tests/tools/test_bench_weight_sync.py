"""`tools/bench.py weight-sync`: what it measures and prints. The slow test makes real pushes."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.ranks import run_ranks

from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import read_model
from megatron_dapo.sync.sink_checks import problems
from megatron_dapo.sync.sinks import Padding, Sink, SinkTable
from megatron_dapo.sync.sources import LocalWeights, holdings
from megatron_dapo.weights.names import hf_shapes


@pytest.fixture
def modules(bench):
    """The files of the benchmark, by name."""
    names = ("weight_sync", "weight_sync_ranks", "weight_sync_tables")
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in names})


def push(seconds: float, *workers: tuple[int, float, float, int]) -> dict:
    """workers: (bytes received, repacking, copies to kernels, peak) of each."""
    keys = ("repack_seconds", "kernel_copy_seconds", "peak_extra_bytes")
    return {
        "seconds": seconds,
        "received": [worker[0] for worker in workers],
        "workers": [dict(zip(keys, worker[1:], strict=True)) for worker in workers],
    }


MEASURED = {
    "pushes": [
        push(9.0, (600, 9.0, 9.0, 9000)),  # the first one counts nowhere
        push(4.0, (600, 1.0, 0.1, 70), (500, 0.5, 0.3, 80)),
        push(2.0, (600, 0.25, 0.1, 90), (500, 0.5, 0.1, 60)),
        push(3.0, (600, 0.75, 0.2, 70), (500, 0.5, 0.1, 80)),
    ],
    "lower_bound_bytes": [600, 400],
    "memcpy_gbps": 1.1e-6,  # so that 1100 bytes take a second
    "peak_extra_bytes_sender": 1200,
    "baselines": {"full-gather": [push(9.0), push(7.5, (1000, 2.0, 0.0, 10), (1000, 1.0, 0.0, 10))]},
}


def test_report(modules):
    report = modules.weight_sync.report(MEASURED, 1000)
    assert report.pop("cores") > 0
    assert report == {
        "model_bytes": 1000,
        "bytes_received_per_worker": [600, 500],
        "lower_bound_bytes": [600, 400],
        "ratio_bytes": 1.25,  # 500 / 400
        "seconds": 3.0,
        "memcpy_gbps": 0.0,
        "seconds_over_memcpy": 3.0,
        "repack_seconds": 0.75,  # the slowest workers of the pushes: 1.0, 0.5, 0.75
        "kernel_copy_seconds": 0.2,  # 0.3, 0.1, 0.2
        "without_repack_over_memcpy": 2.25,
        "peak_extra_bytes_sender": 1200,
        "peak_extra_bytes_receiver": 90,
        "baseline": {
            "full-gather": {"seconds": 7.5, "repack_seconds": 2.0, "bytes_received_per_worker": [1000, 1000]}
        },
        "baseline_over_ours": {"full-gather": 2.5},
    }


def test_the_run_that_is_measured(bench, modules, monkeypatch):
    started = []

    def start_ranks(config, arguments):
        started.append((config, arguments))
        Path(arguments[-1]).write_text(json.dumps(MEASURED))
        return 0

    monkeypatch.setattr(modules.weight_sync, "start_ranks", start_ranks)
    monkeypatch.setenv("PYTHONPATH", "")  # set by the benchmark for the processes that it starts
    options = ["--trainer", "tp2,pp2", "--engine", "tp2", "--pushes", "4", "--baseline", "full-gather"]
    report = bench("weight-sync", "--config", "tiny", *options, "sync.chunk_bytes=1000")
    assert report["model_bytes"] == 2 * 3_178_752  # tools/model_configs/tiny_base.json, in bf16
    assert report["seconds"] == 3.0
    [(config, arguments)] = started
    assert config.layout.to_layout() == Layout(tp=2, pp=2) and config.rollout.tensor_parallel == 2
    assert config.model.dtype == "bf16" and config.sync.chunk_bytes == 1000
    assert config.rollout.extra_args[:2] == ["--load-format", "dummy"]
    assert arguments[:2] == ["-m", "benchmarks.weight_sync_ranks"]
    assert arguments[3:5] == ["4", "full-gather"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pushes", "1"], "--pushes 1 must be at least 2"),
        (["--trainer", "tp2,x2"], "--trainer tp2,x2: 'x2' must be one of tp, pp, vpp, cp, ep, dp and a size"),
        (["--engine", "pp2"], "--engine pp2: 'pp2' must be one of tp and a size"),
        (["--trainer", "tp3"], "tensor_parallel=3 does not divide the model's 4 attention heads"),
        (["--engine", "tp4"], "rollout.tensor_parallel=4 does not divide the model's 4 heads"),
    ],
)
def test_what_cannot_be_measured(bench, options, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        bench("weight-sync", "--config", "tiny", *options)


@pytest.mark.parametrize(
    ("name", "elements"), [("qwen2.5-0.5b-like", 494_032_768), ("qwen2.5-1.5b-like", 1_543_714_304)]
)
def test_the_models_are_as_large_as_those_they_are_like(modules, tmp_path, name, elements):
    modules.weight_sync.make_folder(tmp_path / name, name)
    assert sum(map(math.prod, hf_shapes(read_model(tmp_path / name)).values())) == elements


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2), Layout(tp=2, dp=2)], ids=Layout.describe)
def test_the_ranks_hold_the_whole_model(modules, tmp_path, layout):
    modules.weight_sync.make_folder(tmp_path / "model", "tiny")
    spec = read_model(tmp_path / "model")
    shapes, places = hf_shapes(spec), holdings(spec, layout)
    ranks = [
        modules.weight_sync_ranks.Weights(places, shapes, rank, torch.bfloat16)
        for rank in range(layout.world_size)
    ]
    for name, parts in places.items():
        for part in parts:
            views = [
                LocalWeights(ranks[rank].held).view(name, part.box.start, part.box.size)
                for rank in part.ranks
            ]
            assert all(torch.equal(view, views[0]) for view in views)
            assert len(torch.unique(views[0])) > 10  # values that tell places apart
    exported = dict.fromkeys(shapes, 0)
    for weights in ranks:
        for shard in weights.contributed:
            exported[shard.name] += shard.tensor.numel()
    assert exported == {name: math.prod(shape) for name, shape in shapes.items()}


def test_all_values_change_between_pushes(modules, tmp_path):
    modules.weight_sync.make_folder(tmp_path / "model", "tiny")
    spec = read_model(tmp_path / "model")
    weights = modules.weight_sync_ranks.Weights(holdings(spec, Layout()), hf_shapes(spec), 0, torch.float32)
    before = [shard.tensor.clone() for shard in weights.held]
    weights.change()
    assert all((shard.tensor != old).all() for shard, old in zip(weights.held, before, strict=True))


# A worker of two: rows 2 and 3 of a tensor of three rows, the second is padding.
TABLE = SinkTable(
    (Sink("lm_head.weight", "lm_head.weight", (2, 0), (1, 8), 0, (8, 1)),),
    {"lm_head.weight": "bfloat16"},
    {"lm_head.weight": (2, 8)},
    padding=(Padding("lm_head.weight", 8, (1, 8), (8, 1), 0.0),),
)


def test_a_worker_needs_its_parameters_without_padding(modules):
    assert modules.weight_sync_tables.shard_bytes(TABLE) == 8 * 2


def test_a_worker_that_is_sent_all_tensors_whole(modules):
    shapes = {"lm_head.weight": (3, 8), "model.norm.weight": (8,)}
    whole = modules.weight_sync_tables.whole_table(TABLE, shapes)
    assert whole.whole == tuple(shapes) and whole.num_elements == 0
    assert problems([whole], shapes) == [] and problems([TABLE], shapes) != []
    assert whole.dtypes == TABLE.dtypes and modules.weight_sync_tables.shard_bytes(whole) == 32


@pytest.mark.slow
def test_real_pushes(bench, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    options = ["--trainer", "tp2", "--engine", "tp1", "--pushes", "2", "sync.chunk_bytes=1000000"]
    options += ["--baseline", "full-gather", "--baseline", "shm-whole", "--baseline", "safetensors-reload"]
    report = bench("weight-sync", "--config", "tiny", "--delta", *options)
    size = report["model_bytes"]
    assert report["bytes_received_per_worker"] == report["lower_bound_bytes"] == [size]
    assert report["ratio_bytes"] == 1.0
    assert 0 < report["repack_seconds"] < report["seconds"] and report["memcpy_gbps"] > 0
    assert 0.5 * 2e6 < report["peak_extra_bytes_sender"] <= 2.1e6  # two chunks
    full, whole, reload = (
        report["baseline"][name] for name in ("full-gather", "shm-whole", "safetensors-reload")
    )
    for way in (full, whole):
        assert way["bytes_received_per_worker"] == [size] and 0 < way["repack_seconds"] < way["seconds"]
    assert size < reload["bytes_received_per_worker"][0] < 1.1 * size  # and the files' headers
    assert 0 < reload["repack_seconds"] < reload["seconds"]
    delta = report["delta"]
    # the second rank has half of the model, but for what both hold
    assert 0.4 * size < delta["bytes_between_hosts_without"] < 0.5 * size
    assert 0 < delta["bytes_between_hosts"] < 0.1 * delta["bytes_between_hosts_without"]
    assert delta["seconds"] > 0 and delta["seconds_without"] > 0


def test_bytes_of_deltas_are_of_the_pushes_after_the_first(modules):
    ways = {"without": 4 * 1000, "with": 1000 + 3 * 70}
    measured = {"delta": {way: {"pushes": MEASURED["pushes"], "sent_bytes": n} for way, n in ways.items()}}
    assert modules.weight_sync.report(MEASURED | measured, 1000)["delta"] == {
        "seconds": 3.0,
        "seconds_without": 3.0,
        "bytes_between_hosts": 70,
        "bytes_between_hosts_without": 1000,
    }


def test_the_gather_makes_tensors_whole(modules, bench):
    assert run_ranks("support.jobs_gather:compare", 4) == [[]] * 4
