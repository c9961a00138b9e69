"""Sink tables of engines in block FP8 without an engine: vLLM's loaders in a pretended world, for checkpoints
that vLLM's own function has quantised. No kernel is needed, for nothing computes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fp8_checkpoints import EXPERTS, SIZES, quantised
from support.sink_models import Checkpoint, differing, make_checkpoint

from megatron_dapo.sync.sink_checks import problems
from megatron_dapo.sync.sinks import SinkTable
from megatron_dapo.weights.block_fp8 import (
    Shapes,
    checkpoint_facts,
    linear_weights,
    quantization_config,
    scale_shapes,
)


def make(folder: Path, arch: str, **changed: int) -> tuple[Checkpoint, Shapes]:
    """A checkpoint in fp32, and the shapes of the tensors of its quantisation."""
    sizes = SIZES | (EXPERTS if arch == "qwen3_moe" else {}) | changed
    source = make_checkpoint(folder, arch, tied=False, **sizes)
    return source, {**source.shapes, **scale_shapes(linear_weights(source.shapes))}


def engine_of(source: Checkpoint, **layout: Any) -> Any:
    from megatron_dapo.sync.vllm import sinks_pretend

    quantization = quantization_config(source.shapes)
    return sinks_pretend.engine_config(source.folder, quantization=quantization, **layout)


def tables_of(config: Any, shapes: Shapes) -> list[SinkTable]:
    from megatron_dapo.sync.vllm import sinks_pretend

    return sinks_pretend.tables_without_engine(config, checkpoint_facts(shapes, torch.bfloat16))


def check(config: Any, shapes: Shapes, tensors: dict[str, torch.Tensor]) -> list[SinkTable]:
    """The tables of all ranks, when nothing is wrong with them."""
    from megatron_dapo.sync.vllm import sinks_pretend

    tables = tables_of(config, shapes)
    assert problems(tables, shapes) == []
    for rank, table in enumerate(tables):
        assert table.whole == () and {"float8_e4m3fn", "float32", "bfloat16"} == set(table.dtypes.values())
        with sinks_pretend.pretend(config, rank), sinks_pretend.without_fp8_kernels():
            assert list(differing(config, table, tensors)) == []
    return tables


DENSE = [{"tp": 1}, {"tp": 2}, {"pp": 2}]
EXPERT_PARALLEL = {"tp": 2, "expert_parallel": True}


@pytest.mark.parametrize(
    ("arch", "layout"),
    [(arch, layout) for arch in ("qwen2", "qwen3", "llama", "mistral", "qwen3_moe") for layout in DENSE]
    + [("qwen3_moe", EXPERT_PARALLEL)],
)
def test_tables_fill_what_the_loader_fills(tmp_path, arch, layout):
    source, shapes = make(tmp_path, arch)
    tables = check(engine_of(source, **layout), shapes, quantised(source.tensors))
    assert {table.tp for table in tables} == {layout.get("tp", 1)}


def test_scales_of_a_cache_may_be_unset_in_such_engines_alone(tmp_path):
    source, shapes = make(tmp_path, "llama")
    [table] = tables_of(engine_of(source), shapes)
    unset = [name for name in table.shapes if ".attn." in name]
    assert len(unset) == 2 * 4  # two layers
    assert problems([table], shapes) == []
    found = problems([table], source.shapes)  # as if the checkpoint were not quantised
    assert [line for line in found if line.endswith("attn.k_scale: 1 of 1 elements are never written")]
    sinks = tuple(sink for sink in table.sinks if "layers.1.mlp.down" not in sink.parameter)
    other = dataclasses.replace(table, sinks=sinks)
    assert len([line for line in problems([other], shapes) if line.endswith("never written")]) == 2


def test_workers_with_half_a_block_of_every_expert(tmp_path):
    """vLLM halves the blocks, and repeats the scales as it loads them."""
    source, shapes = make(tmp_path, "qwen3_moe", moe_intermediate_size=128)
    tables = check(engine_of(source, tp=2), shapes, quantised(source.tensors))
    assert tables[0].shapes["model.layers.0.mlp.experts.routed_experts.w2_weight_scale_inv"] == (4, 8, 1)


def test_dummy_weights_leave_no_trace_in_buffers(tmp_path):
    """As in test_dummy_weights.py; here vLLM leaves dummy values in the scales of the cache."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    from megatron_dapo.sync.vllm import sinks_pretend
    from megatron_dapo.sync.vllm.extension import default_cache_scales
    from megatron_dapo.sync.vllm.sinks_twin import build

    source, _ = make(tmp_path, "llama")
    config = engine_of(source)
    with sinks_pretend.pretend(config, 0), sinks_pretend.without_fp8_kernels():
        model: Any = build(config)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        assert any(name.endswith("attn._q_scale") for name in buffers)
        DummyModelLoader(LoadConfig(load_format="dummy")).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        default_cache_scales(model)
    after = dict(model.named_buffers())
    assert {name for name, before in buffers.items() if not torch.equal(before, after[name])} == set()
