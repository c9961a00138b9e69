"""Block FP8 made by the policy's ranks: the bits of vLLM's own function, from any rank's slice, and by way of
vLLM's sink tables what its loader makes of the quantised checkpoint.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sink_models import differing
from support.weights import megatron_names, small_model

from megatron_dapo.errors import UserError
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import read_model
from megatron_dapo.sync.fp8_blocks import BlockWeights, block_holdings
from megatron_dapo.sync.plan import Worker, make_plan
from megatron_dapo.sync.regions import MappedBox
from megatron_dapo.sync.sink_checks import problems
from megatron_dapo.sync.sources import Held, holdings
from megatron_dapo.weights.block_fp8 import (
    checkpoint_facts,
    linear_weights,
    quantization_config,
    quantize,
    scale_shapes,
)
from megatron_dapo.weights.names import hf_shapes
from megatron_dapo.weights.slices import Shard, slices_of

MODEL_CONFIGS = Path(__file__).parents[2] / "tools" / "model_configs"
# Heads of 128; the last block of an mlp's rows or columns is not full.
SIZES = dict(hidden_size=512, num_heads=4, num_kv_heads=2, head_dim=128, ffn_size=600, vocab_size=320)


def block_weights(whole, model, rank, tp, linear) -> BlockWeights:
    """What a tensor-parallel rank has."""
    shards = []
    for name in megatron_names(model, transformer_engine=False):
        slices = slices_of(name, model, tp=tp, tp_rank=rank)
        parts = [whole[s.hf].narrow(s.dim, s.hf_start, s.size) for s in slices]
        shards.append(Shard(name, torch.cat(parts, dim=slices[0].dim), tuple(slices)))
    return BlockWeights(shards, linear)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, theirs, strict=True))


def random_weight(rows: int, columns: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * scale).to(torch.bfloat16)


def test_blocks_by_hand():
    weight = torch.zeros(130, 256, dtype=torch.bfloat16)
    weight[0, 0], weight[5, 100] = 896, -450  # scale 2; 225 lies between 224 and 240
    weight[129, 128] = 7  # the second row of blocks has two rows; scale 1/64
    values, scales = quantize(weight)
    assert values.dtype == torch.float8_e4m3fn and values.shape == weight.shape
    smallest = torch.tensor(1e-4) / 448  # of a block of zeros
    assert scales.tolist() == [[2.0, smallest.item()], [smallest.item(), 1 / 64]]
    expected = torch.zeros(130, 256)
    expected[0, 0], expected[5, 100], expected[129, 128] = 448, -224, 448
    assert torch.equal(values.float(), expected)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 9999), st.sampled_from([1e-7, 0.02, 1, 1e4]))
@settings(max_examples=60, deadline=None)
def test_the_bits_of_vllms_own_function(rows, columns, seed, scale):
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    weight = random_weight(rows, columns, seed, scale)
    with torch.compiler.set_stance("force_eager"):
        expected = per_block_cast_to_fp8(weight, [128, 128], use_ue8m0=False)
    assert same(quantize(weight), expected)


def test_the_bits_of_vllms_compiled_function():
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    for rows, columns in ((256, 384), (200, 300)):
        weight = random_weight(rows, columns, rows, 0.02)
        assert same(quantize(weight), per_block_cast_to_fp8(weight, [128, 128], use_ue8m0=False))


@functools.cache
def checkpoint(**changed: int) -> dict[str, torch.Tensor]:
    """Of an untied Qwen2, in fp32."""
    generator = torch.Generator().manual_seed(0)
    shapes = hf_shapes(small_model(**SIZES | changed))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("tp", [1, 2])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_part_of_what_a_rank_holds(tp, data):
    # with tp 2 an mlp of 600 would be cut inside a block; the attention is not
    model, layout, whole = small_model(**SIZES), Layout(tp=tp), checkpoint()
    name = f"model.layers.1.self_attn.{data.draw(st.sampled_from('qkvo'))}_proj.weight"
    if tp == 1 and data.draw(st.booleans()):
        name = f"model.layers.0.mlp.{data.draw(st.sampled_from(['gate', 'up', 'down']))}_proj.weight"
    linear = {name: whole[name].shape}
    held = block_holdings(holdings(model, layout), linear)
    values, scales = quantize(whole[name].to(torch.bfloat16))
    for source, expected in ((name, values), (name + "_scale_inv", scales)):
        part = data.draw(st.sampled_from(held[source]))
        ends = [s + n for s, n in zip(part.box.start, part.box.size, strict=True)]
        start = [data.draw(st.integers(s, end - 1)) for s, end in zip(part.box.start, ends, strict=True)]
        size = [data.draw(st.integers(1, end - s)) for s, end in zip(start, ends, strict=True)]
        for rank in part.ranks:
            weights = block_weights(whole, model, rank, tp, linear)
            found = weights.view(source, tuple(start), tuple(size))
            box = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
            assert found.shape == tuple(size) and torch.equal(bits(found), bits(expected[box]))


def test_what_is_not_quantised_stays():
    model, whole = small_model(**SIZES), checkpoint()
    weights = block_weights(whole, model, 0, 1, linear_weights(hf_shapes(model)))
    name = "model.embed_tokens.weight"
    assert torch.equal(weights.view(name, (3, 0), (5, 512)), whole[name][3:8])
    with pytest.raises(LookupError, match="does not hold"):
        weights.view("model.embed_tokens.weight_scale_inv", (0, 0), (1, 1))


def test_slices_inside_a_block_are_refused():
    model = small_model(**SIZES)
    with pytest.raises(
        UserError, match=r"rows 0 to 299 of model.layers.0.mlp.gate_proj.weight.*blocks of 128"
    ):
        block_holdings(holdings(model, Layout(tp=2)), linear_weights(hf_shapes(model)))
    narrow = small_model(**SIZES | {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64})
    with pytest.raises(UserError, match=r"rows 0 to 63 of model.layers.0.self_attn.k_proj.weight"):
        block_holdings(holdings(narrow, Layout()), linear_weights(hf_shapes(narrow)))


def test_a_part_that_begins_inside_a_block_is_refused():
    held = {"q_proj.weight": (Held(MappedBox((0, 64), (128, 64)), (0,)),)}
    with pytest.raises(UserError, match=r"columns 64 to 127 of q_proj.weight"):
        block_holdings(held, {"q_proj.weight": (128, 128)})


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_flagships_slices_are_whole_blocks(tmp_path, tp):
    (tmp_path / "config.json").write_text((MODEL_CONFIGS / "Qwen2.5-32B.json").read_text())
    (tmp_path / "tokenizer.json").write_text("{}")  # which is only looked for
    model = read_model(tmp_path)
    linear = linear_weights(hf_shapes(model))
    held = block_holdings(holdings(model, Layout(tp=tp)), linear)
    shapes = {**hf_shapes(model), **scale_shapes(linear)}
    assert held.keys() == shapes.keys()
    for name, parts in held.items():
        assert sum(math.prod(part.box.size) for part in parts) == math.prod(shapes[name])
    # 64 layers: 7 linear layers each
    assert len(linear) == 64 * 7
    assert shapes["model.layers.0.mlp.down_proj.weight_scale_inv"] == (40, 216)


@pytest.mark.parametrize(("trainer", "engine"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_an_engine_gets_what_its_loader_makes_of_the_checkpoint(tmp_path, trainer, engine):
    from megatron_dapo.sync.vllm import sinks_pretend

    model, layout = small_model(**SIZES | {"ffn_size": 512}), Layout(tp=trainer)
    tensors, shapes = checkpoint(ffn_size=512), hf_shapes(model)
    linear = linear_weights(shapes)
    write_config(tmp_path)
    config = sinks_pretend.engine_config(tmp_path, tp=engine, quantization=quantization_config(shapes))
    shapes = {**shapes, **scale_shapes(linear)}
    facts = checkpoint_facts(shapes, torch.bfloat16)
    tables = sinks_pretend.tables_without_engine(config, facts)
    assert problems(tables, shapes) == []

    workers = [Worker(engine="e", rank=t, host="h", device=t, table=table) for t, table in enumerate(tables)]
    held = block_holdings(holdings(model, layout), linear)
    plan = make_plan(workers, held, ["h"] * trainer, chunk_bytes=1 << 18, dtype="bfloat16")
    sources = [block_weights(tensors, model, rank, trainer, linear) for rank in range(trainer)]
    made = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in facts.items()}
    for message in plan.messages:
        for copy in message.parcel.copies:
            sink = copy.sink
            box = tuple(slice(s, s + n) for s, n in zip(sink.start, sink.size, strict=True))
            made[sink.source][box] = sources[message.source].view(sink.source, sink.start, sink.size)

    expected = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    for name in linear:
        expected[name], expected[name + "_scale_inv"] = quantize(expected[name])
    assert {name for name in facts if not torch.equal(bits(made[name]), bits(expected[name]))} == set()
    for rank, table in enumerate(tables):
        with sinks_pretend.pretend(config, rank), sinks_pretend.without_fp8_kernels():
            assert list(differing(config, table, expected)) == []
    assert sum(m.parcel.num_bytes for m in plan.messages) == sum(table.num_bytes for table in tables)


def write_config(folder: Path) -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 320,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
