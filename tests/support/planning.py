"""Engines for tests of the plan: sink tables written by hand as vLLM lays parameters out, random holdings on
many hosts, and a push carried out on real tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.sync.plan import Plan, Worker, item_bytes
from megatron_dapo.sync.sinks import Sink, SinkTable
from megatron_dapo.sync.sources import LocalWeights
from megatron_dapo.weights.names import hf_shapes
from megatron_dapo.weights.slices import Shard, slices_of
from support.weights import megatron_names


class TableByHand:
    """A table under construction: parameters are filled from box after box of the checkpoint."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.sinks = dtype, []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def rows(self, parameter: str, boxes: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> None:
        """A contiguous parameter made of boxes (source, start, size) below each other."""
        offset, height = 0, 0
        for source, start, size in boxes:
            stride = tuple(math.prod(size[d + 1 :]) for d in range(len(size)))
            self.sinks.append(Sink(parameter, source, tuple(start), tuple(size), offset, stride))
            offset += math.prod(size)
            height += size[0]
        self.shapes[parameter] = (height, *boxes[0][2][1:])

    def transposed(self, parameter: str, source: str, start: Sequence[int], size: Sequence[int]) -> None:
        """A parameter that is kept transposed."""
        self.sinks.append(Sink(parameter, source, tuple(start), tuple(size), 0, (1, size[0])))
        self.shapes[parameter] = (size[1], size[0])

    def table(self, tp: int, tp_rank: int) -> SinkTable:
        dtypes = dict.fromkeys(self.shapes, self.dtype)
        return SinkTable(tuple(self.sinks), dtypes=dtypes, shapes=self.shapes, tp=tp, tp_rank=tp_rank)


def engine_table(
    model: ModelSpec, *, tp: int, tp_rank: int, dtype: str = "float32", transpose: bool = False
) -> SinkTable:
    """What vLLM's Qwen and Llama models hold: q, k, v and gate, up fused; key/value heads repeated when
    tensor parallelism is above their number. `transpose`: down_proj is kept transposed.
    """
    made, shapes = TableByHand(dtype), hf_shapes(model)

    def part(name: str, dim: int, parts: int = tp, number: int = tp_rank):
        start, size = [0] * len(shapes[name]), list(shapes[name])
        size[dim] //= parts
        start[dim] = size[dim] * number
        return name, start, size

    def vocabulary(name: str):
        rows = -(-model.vocab_size // tp)
        begin = min(rows * tp_rank, model.vocab_size)
        return name, [begin, 0], [min(rows, model.vocab_size - begin), model.hidden_size]

    kv = min(tp, model.num_kv_heads)
    if vocabulary("model.embed_tokens.weight")[2][0]:
        made.rows("model.embed_tokens.weight", [vocabulary("model.embed_tokens.weight")])
    for i in range(model.num_layers):
        layer = f"model.layers.{i}."
        for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
            name = f"{layer}self_attn.{{}}_proj.{kind}".format
            boxes = [part(name("q"), 0), *(part(name(p), 0, kv, tp_rank * kv // tp) for p in "kv")]
            made.rows(f"{layer}self_attn.qkv_proj.{kind}", boxes)
        for norm in ("q_norm", "k_norm") if model.qk_norm else ():
            made.rows(f"{layer}self_attn.{norm}.weight", [part(f"{layer}self_attn.{norm}.weight", 0, 1, 0)])
        made.rows(f"{layer}self_attn.o_proj.weight", [part(f"{layer}self_attn.o_proj.weight", 1)])
        if model.num_experts:
            experts = [f"{layer}mlp.experts.{e}." for e in range(model.num_experts)]
            made.rows(f"{layer}mlp.gate.weight", [part(f"{layer}mlp.gate.weight", 0, 1, 0)])
            w13 = [part(f"{e}{p}_proj.weight", 0) for e in experts for p in ("gate", "up")]
            made.rows(f"{layer}mlp.experts.w13_weight", w13)
            made.rows(f"{layer}mlp.experts.w2_weight", [part(f"{e}down_proj.weight", 1) for e in experts])
        else:
            gate_up = [part(f"{layer}mlp.{p}_proj.weight", 0) for p in ("gate", "up")]
            made.rows(f"{layer}mlp.gate_up_proj.weight", gate_up)
            put = made.transposed if transpose else lambda name, *box: made.rows(name, [box])
            put(f"{layer}mlp.down_proj.weight", *part(f"{layer}mlp.down_proj.weight", 1))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made.rows(f"{layer}{norm}.weight", [part(f"{layer}{norm}.weight", 0, 1, 0)])
    made.rows("model.norm.weight", [part("model.norm.weight", 0, 1, 0)])
    if not model.tied and vocabulary("lm_head.weight")[2][0]:
        made.rows("lm_head.weight", [vocabulary("lm_head.weight")])
    return made.table(tp, tp_rank)


def make_workers(model: ModelSpec, hosts: Sequence[str], *, tp: int, **options) -> list[Worker]:
    """One engine for each name in `hosts`, on that host; engines of one host stand on its devices in turn."""
    tables = [engine_table(model, tp=tp, tp_rank=t, **options) for t in range(tp)]
    return [
        Worker(
            engine=f"engine {n}",
            rank=t,
            host=host,
            device=hosts[:n].count(host) * tp + t,
            table=tables[t],
        )
        for n, host in enumerate(hosts)
        for t in range(tp)
    ]


def local_weights(
    model: ModelSpec, layout: Layout, rank: int, weights: Mapping[str, torch.Tensor]
) -> LocalWeights:
    """What a rank holds, filled from the checkpoint."""
    return LocalWeights(local_shards(model, layout, rank, weights))


def local_shards(
    model: ModelSpec, layout: Layout, rank: int, weights: Mapping[str, torch.Tensor]
) -> list[Shard]:
    """What a rank holds, filled from the checkpoint. Worked out from Megatron's names, on its own."""
    at = layout.coordinates(rank)
    of_stage = rank % (layout.tp * layout.cp * layout.dp)
    ep = of_stage // layout.etp % layout.ep
    shards = []
    names = megatron_names(model, transformer_engine=True)
    if model.tied:
        names.append("output_layer.weight")
    for name in names:
        stage = 0 if name.startswith("embedding") else layout.pp - 1
        if name.startswith("decoder.layers."):
            per_chunk = model.num_layers // layout.num_stages
            stage = int(name.split(".")[2]) // per_chunk % layout.pp
        expert = ".experts." in name
        per_rank = model.num_experts // layout.ep
        if stage != at.pp or (expert and int(name.rpartition("weight")[2]) // per_rank != ep):
            continue
        tp, tp_rank = (layout.etp, of_stage % layout.etp) if expert else (layout.tp, at.tp)
        slices = slices_of(name, model, tp=tp, tp_rank=tp_rank)
        if slices:
            parts = [weights[s.hf].narrow(s.dim, s.hf_start, s.size) for s in slices]
            shards.append(Shard(name, torch.cat(parts, dim=slices[0].dim), tuple(slices)))
    return shards


def direct(table: SinkTable, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every parameter of the worker, filled from the whole tensors without a plan."""
    made = empty(table)
    for sink in table.sinks:
        box = weights[sink.source]
        for dim, (start, size) in enumerate(zip(sink.start, sink.size, strict=True)):
            box = box.narrow(dim, start, size)
        made[sink.parameter].as_strided(sink.size, sink.stride, sink.offset).copy_(box)
    return made


def empty(table: SinkTable) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(shape, dtype=getattr(torch, table.dtypes[name]))
        for name, shape in table.shapes.items()
    }


def carry_out(
    plan: Plan, held: Sequence[LocalWeights]
) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """The push on real tensors, through a staging buffer for each worker and round: (parameters, how often
    each of their elements was written) by worker.
    """
    filled = [empty(worker.table) for worker in plan.workers]
    writes = [empty(worker.table) for worker in plan.workers]
    for messages in plan.rounds:
        staging: dict[int, bytearray] = {}
        for message in messages:  # pack and send
            parcel = message.parcel
            dtype = getattr(torch, parcel.dtype)
            values = [
                held[message.source].view(c.sink.source, c.sink.start, c.sink.size).to(dtype).reshape(-1)
                for c in parcel.copies
            ]
            packed = torch.cat(values).view(torch.uint8).numpy().tobytes()
            assert len(packed) == parcel.num_bytes
            buffer = staging.setdefault(message.worker, bytearray())
            assert len(buffer) == parcel.offset, "messages fill a chunk from its start without gaps"
            buffer += packed
        for message in messages:  # scatter
            for copy in message.parcel.copies:
                sink, dtype = copy.sink, getattr(torch, message.parcel.dtype)
                assert copy.offset % item_bytes(message.parcel.dtype) == 0
                count = math.prod(sink.size)
                buffer = staging[message.worker]
                values = torch.frombuffer(buffer, dtype=dtype, offset=copy.offset, count=count)
                filled[message.worker][sink.parameter].as_strided(sink.size, sink.stride, sink.offset).copy_(
                    values.view(sink.size)
                )
                writes[message.worker][sink.parameter].as_strided(sink.size, sink.stride, sink.offset).add_(1)
    return filled, writes
