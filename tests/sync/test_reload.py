"""Where the rows of an update are written, and when a layer is repacked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.push import checkpoint
from support.receiving import Worker, computed, differing, make_two, worker

from megatron_dapo.sync.manifest import Piece

EMBEDDING = "model.embed_tokens"
NORM = "model.layers.0.input_layernorm"
LINEAR = "model.layers.0.mlp.down_proj"


@pytest.fixture
def case(tmp_path) -> Iterator[tuple[Worker, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """A worker that has loaded the first of two tied models, and the tensors of both."""
    folders = make_two(tmp_path, "qwen2", tied=True)
    first, second = map(checkpoint, folders)
    with worker(folders[0], tmp_path / "digests") as live:
        yield live, first, second


def test_what_kernels_use_as_it_is_loaded_is_written_to_their_own_memory(case):
    live, _, second = case
    plan = live.plan(second)
    layers = {name: live.model.get_submodule(name) for name in (EMBEDDING, NORM, LINEAR)}
    before = {name: layer.weight for name, layer in layers.items()}
    assert before[LINEAR].numel() == 0  # packed elsewhere
    live.receiver.start_weight_update()
    arrivals, rows = live.receiver._arrivals, live.receiver._rows
    table = plan.workers[0].table
    for name, layer in layers.items():
        [number] = [n for n, sink in enumerate(table.sinks) if sink.parameter == f"{name}.weight"]
        size = (1, *table.sinks[number].size[1:])
        zeros = (0,) * len(size)
        row = arrivals.take(Piece(sink=number, source=None, start=zeros, size=size, offset=0))
        values = second[row.source][:1]
        rows.load([(row, values)], verify=True)
        alike = name != LINEAR
        assert (layer.weight.data_ptr() == before[name].data_ptr()) == alike
        assert torch.equal(layer.weight.view(-1)[: values.numel()], values.view(-1))
        assert layer.weight.shape == table.shapes[f"{name}.weight"]
        assert layer.weight is not before[name]  # that one is put back when all of it is there
    live.push(plan, second, 1)
    for name in (EMBEDDING, NORM):
        assert layers[name].weight is before[name]
        assert torch.equal(before[name][:8], second[f"{name}.weight"][:8])


def test_a_layer_is_repacked_once_and_at_its_last_row(case, monkeypatch):
    live, first, second = case
    layer, packed = live.model.get_submodule(LINEAR), []
    process = type(layer.quant_method).process_weights_after_loading

    def note(method: Any, of: Any) -> None:
        if of is layer:
            packed.append(torch.equal(of.weight, second[f"{LINEAR}.weight"]))
        process(method, of)

    monkeypatch.setattr(type(layer.quant_method), "process_weights_after_loading", note)
    plan = live.plan(second, chunk_bytes=1 << 12)
    live.receiver.start_weight_update()
    live.send(plan, second, 1, names={f"{LINEAR}.weight"})
    assert packed == [True]
    live.send(plan, second, 1, names=second.keys() - {f"{LINEAR}.weight"})
    live.receiver.finish_weight_update()
    assert packed == [True]
    live.push(plan, first, 2)
    assert live.as_loaded("v2") == live.as_loaded("load")


def test_weights_that_are_only_packed_are_read_where_they_lie(case, monkeypatch):
    """In a chunk with all of their layer, if the parts of a fused weight follow each other in it."""
    live, first, second = case
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    names = {layer: name for name, layer in live.model.named_modules() if isinstance(layer, LinearBase)}
    process, read = UnquantizedLinearMethod.process_weights_after_loading, []

    def note(method: Any, layer: Any) -> None:
        memory = live.receiver._memory._bytes
        if memory.data_ptr() <= layer.weight.data_ptr() < memory.data_ptr() + len(memory):
            read.append(names[layer])
        process(method, layer)

    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", note)
    plan = live.plan(second, chunk_bytes=1 << 12)
    live.push(plan, second, 1)
    assert read == []  # no chunk has the whole of a layer
    copied = computed(live.model)
    live.push(live.plan(first), first, 2)
    read.clear()
    live.push(live.plan(second, chunk_bytes=1 << 20), second, 3)  # its memory becomes NaN after each chunk
    expected = {
        name for name in names.values() if not name.endswith("qkv_proj")
    }  # biases lie between its parts
    assert set(read) == expected
    assert not differing(computed(live.model), copied)
