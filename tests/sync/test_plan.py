"""The plan of a push: what arrives, from whom, in which chunks; over layouts, engines and hosts."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planning import (
    carry_out,
    direct,
    engine_table,
    local_weights,
    make_workers,
)
from support.weights import make_weights, small_model

from megatron_dapo.errors import UserError
from megatron_dapo.layout import Layout
from megatron_dapo.sync.plan import Plan, Worker, make_plan
from megatron_dapo.sync.regions import MappedBox
from megatron_dapo.sync.sinks import Sink, SinkTable
from megatron_dapo.sync.sources import Held, holdings

TESTS = Path(__file__).parents[1]
SIZES = dict(num_layers=4, hidden_size=8, num_heads=8, num_kv_heads=4, head_dim=2, ffn_size=16, vocab_size=13)
DENSE, TIED = small_model(**SIZES), small_model(**SIZES, tied=True)
EXPERTS = small_model(**SIZES, num_experts=4, qkv_bias=False, qk_norm=True)

layouts = st.one_of(
    st.builds(
        Layout,
        tp=st.sampled_from([1, 2, 4]),
        cp=st.sampled_from([1, 2]),
        dp=st.sampled_from([1, 2, 3]),
        pp=st.just(2),
        vpp=st.sampled_from([None, 2]),
    ),
    st.builds(
        Layout, tp=st.sampled_from([1, 2, 4]), dp=st.sampled_from([1, 2]), pp=st.sampled_from([1, 2, 4])
    ),
)
expert_layouts = st.builds(
    Layout,
    tp=st.just(2),
    dp=st.just(4),
    pp=st.sampled_from([1, 2]),
    ep=st.sampled_from([1, 2, 4]),
    etp=st.sampled_from([1, 2]),
)
cases = st.one_of(
    st.tuples(st.sampled_from([DENSE, TIED]), layouts), st.tuples(st.just(EXPERTS), expert_layouts)
)


def spread(num_ranks: int, per_host: int) -> list[str]:
    return [f"host {rank // per_host}" for rank in range(num_ranks)]


def received(plan: Plan) -> Counter[int]:
    counted = Counter()
    for message in plan.messages:
        counted[message.worker] += message.parcel.num_bytes
    return counted


def sent(plan: Plan) -> list[int]:
    counted = [0] * len(plan.rank_hosts)
    for message in plan.messages:
        counted[message.source] += message.parcel.num_bytes
    return counted


# --- everything arrives once, whatever the layouts --------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    case=cases,
    tp=st.sampled_from([1, 2, 4, 8]),
    per_host=st.sampled_from([1, 2, 3, 8]),
    engine_hosts=st.lists(st.sampled_from(["host 0", "host 1", "host 9"]), min_size=1, max_size=3),
    chunk_bytes=st.sampled_from([40, 1000, 1 << 20]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    transpose=st.booleans(),
)
def test_every_element_arrives_once_and_equals_a_direct_fill(
    case, tp, per_host, engine_hosts, chunk_bytes, dtype, transpose
):
    model, layout = case
    weights = make_weights(model)
    workers = make_workers(model, engine_hosts, tp=tp, dtype=dtype, transpose=transpose)
    hosts = spread(layout.world_size, per_host)
    plan = make_plan(workers, holdings(model, layout), hosts, chunk_bytes=chunk_bytes, dtype=dtype)
    held = [local_weights(model, layout, rank, weights) for rank in range(layout.world_size)]
    filled, writes = carry_out(plan, held)
    for worker, parameters, counts in zip(workers, filled, writes, strict=True):
        for name, expected in direct(worker.table, weights).items():
            assert torch.equal(parameters[name], expected), name
            assert (counts[name] == 1).all(), name
    assert received(plan) == {w: worker.table.num_bytes for w, worker in enumerate(workers)}
    for messages in plan.rounds:
        chunk = Counter()
        for message in messages:
            chunk[message.worker] += message.parcel.num_bytes
            for copy in message.parcel.copies:
                sink = workers[message.worker].table.sinks[copy.number]
                assert sink.part(copy.sink.start, copy.sink.size) == copy.sink
        assert max(chunk.values()) <= chunk_bytes


@settings(max_examples=40, deadline=None)
@given(case=cases, num_engines=st.integers(1, 5), chunk_bytes=st.sampled_from([1000, 1 << 20]))
def test_replicas_far_from_the_engines_send_the_same_but_for_one_message(case, num_engines, chunk_bytes):
    model, layout = case
    workers = make_workers(model, [f"engines {n}" for n in range(num_engines)], tp=2)
    hosts = spread(layout.world_size, 4)
    plan = make_plan(workers, holdings(model, layout), hosts, chunk_bytes=chunk_bytes, dtype="float32")
    bytes_sent = sent(plan)
    largest = max(message.parcel.num_bytes for message in plan.messages)
    assert largest <= chunk_bytes // 8
    if model.num_experts:  # what replicas of the dense layers hold of the experts may differ
        return
    for a in range(layout.world_size):
        for b in range(layout.world_size):
            at, other = layout.coordinates(a), layout.coordinates(b)
            if (at.tp, at.pp) == (other.tp, other.pp):
                assert bytes_sent[a] - bytes_sent[b] <= largest


# --- who sends --------------------------------------------------------------------------


def one_sink(**changed) -> SinkTable:
    sink = Sink(
        **{**dict(parameter="p.w", source="w", start=(0,), size=(4,), offset=0, stride=(1,)), **changed}
    )
    return SinkTable((sink,), dtypes={"p.w": "float32"}, shapes={"p.w": (4,)})


def worker(host: str, device: int = 0, table: SinkTable | None = None) -> Worker:
    return Worker(engine=f"on {host}", rank=0, host=host, device=device, table=table or one_sink())


HELD = {"w": (Held(MappedBox((0,), (4,)), (1, 2, 3)),)}  # of four ranks on two hosts
HOSTS = ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("host", "device", "carrier", "source"),
    [
        ("a", 1, 1, 1),  # the carrier holds it
        ("a", 0, 0, 1),  # the carrier does not, its neighbour does
        ("a", 2, 0, 1),  # more devices than ranks: they take turns
        ("b", 1, 3, 3),
        ("c", 0, "c", 1),  # no rank on its host: any, and the host's own process carries
    ],
)
def test_the_nearest_rank_sends(host, device, carrier, source):
    plan = make_plan([worker(host, device)], HELD, HOSTS, chunk_bytes=1024, dtype="float32")
    [message] = plan.messages
    assert (plan.carriers, message.source) == ((carrier,), source)


def test_of_several_equally_near_the_one_that_has_sent_least():
    workers = [worker("c"), worker("d"), worker("e"), worker("f"), worker("a", 1)]
    plan = make_plan(workers, HELD, HOSTS, chunk_bytes=1024, dtype="float32")
    assert [message.source for message in plan.messages] == [1, 2, 3, 1, 1]


def test_the_flagship_in_time_and_balance():
    """128 ranks, 32 engines of 4 workers, the sizes of Qwen2.5-32B."""
    sizes = dict(num_layers=64, hidden_size=5120, num_heads=40, num_kv_heads=8, head_dim=128)
    model = small_model(**sizes, ffn_size=27648, vocab_size=152064)
    workers = make_workers(model, [f"host {n // 2}" for n in range(32)], tp=4, dtype="bfloat16")
    hosts = spread(128, 8)
    begin = time.process_time()
    held = holdings(model, Layout(tp=8, sp=True, pp=4, dp=4))
    plan = make_plan(workers, held, hosts, chunk_bytes=1 << 30, dtype="bfloat16")
    assert time.process_time() - begin < 10  # 0.4 s on an idle core; the budget is 2
    assert workers[0].table.num_elements == 8_191_464_448
    assert received(plan) == {w: worker.table.num_bytes for w, worker in enumerate(workers)}
    assert plan.carriers == tuple(range(128))
    bytes_sent = sent(plan)
    assert max(bytes_sent) <= 1.1 * sum(bytes_sent) / 128
    for messages in plan.rounds[:-1]:  # all stages of the pipeline send in every round
        assert {message.source // 32 for message in messages} == {0, 1, 2, 3}
    stage = [m.source // 32 for m in plan.messages if hosts[m.source] == workers[m.worker].host]
    assert {s: n > 0 for s, n in Counter(stage).items()} == dict.fromkeys(range(4), True)


# --- chunks -----------------------------------------------------------------------------


def test_a_module_comes_in_one_chunk_where_it_fits():
    model = small_model(**SIZES)
    table = engine_table(model, tp=1, tp_rank=0)
    sizes = Counter()
    for sink in table.sinks:
        sizes[sink.parameter.rpartition(".")[0]] += sink.num_elements * 4
    limit = max(sizes.values()) + 50
    plan = make_plan(
        [worker("a", table=table)], holdings(model, Layout()), ["a"], chunk_bytes=limit, dtype="float32"
    )
    seen = Counter()
    for messages in plan.rounds:
        modules = {c.sink.parameter.rpartition(".")[0] for m in messages for c in m.parcel.copies}
        seen.update(modules)
    assert len(plan.rounds) > 3 and set(seen.values()) == {1} and seen.keys() == sizes.keys()


def test_larger_elements_come_first_so_that_all_are_aligned():
    sinks = (
        Sink("m.scale", "w", (0,), (1,), 0, (1,)),
        Sink("m.weight", "w", (1,), (3,), 0, (1,)),
        Sink("m.bias", "w", (0,), (4,), 0, (1,)),
    )
    dtypes = {"m.scale": "float32", "m.weight": "uint8", "m.bias": "bfloat16"}
    table = SinkTable(sinks, dtypes=dtypes, shapes={"m.scale": (1,), "m.weight": (3,), "m.bias": (4,)})
    [messages] = make_plan([worker("a", table=table)], HELD, HOSTS, chunk_bytes=400, dtype="float32").rounds
    assert [(m.parcel.dtype, m.parcel.offset, m.parcel.num_bytes) for m in messages] == [
        ("float32", 0, 4),
        ("bfloat16", 4, 8),
        ("uint8", 12, 3),
    ]


def test_tensors_that_a_loader_computes_with_are_sent_whole():
    held = {"w": (Held(MappedBox((0, 0), (2, 3)), (0,)), Held(MappedBox((2, 0), (2, 3)), (1,)))}
    table = SinkTable((), whole=("w",), dtypes={}, shapes={})
    plan = make_plan([worker("a", table=table)], held, HOSTS, chunk_bytes=1024, dtype="bfloat16")
    [first, second] = plan.messages
    assert (first.source, second.source) == (0, 1)
    assert first.parcel.copies[0].sink == Sink("w", "w", (0, 0), (2, 3), 0, (3, 1))
    assert second.parcel.copies[0].sink == Sink("w", "w", (2, 0), (2, 3), 6, (3, 1))
    assert second.parcel.dtype == "bfloat16" and second.parcel.offset == 12
    assert [m.parcel.copies[0].number for m in (first, second)] == [None, None]


# --- the same everywhere ----------------------------------------------------------------


def make(**changed) -> Plan:
    model = changed.pop("model", DENSE)
    workers = make_workers(model, changed.pop("engine_hosts", ["host 0", "host 1"]), tp=2)
    hosts = changed.pop("hosts", spread(8, 4))
    return make_plan(
        workers,
        holdings(model, Layout(tp=2, pp=2, dp=2)),
        hosts,
        **{"chunk_bytes": 1000, "dtype": "float32", **changed},
    )


def test_another_process_makes_the_same_plan():
    code = "from sync.test_plan import make; print(make().digest)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TESTS,
        env={**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == make().digest


def test_tables_that_are_equal_but_not_the_same_object():
    plan = make()
    workers = [dataclasses.replace(w, table=SinkTable.from_json(w.table.to_json())) for w in plan.workers]
    other = make_plan(
        workers, holdings(DENSE, Layout(tp=2, pp=2, dp=2)), plan.rank_hosts, chunk_bytes=1000, dtype="float32"
    )
    assert other.digest == plan.digest


@pytest.mark.parametrize(
    "changed",
    [
        {"chunk_bytes": 900},
        {"hosts": spread(8, 2)},
        {"engine_hosts": ["host 0", "host 0"]},
        {"model": TIED},
        {"model": small_model(**{**SIZES, "ffn_size": 32})},
    ],
)
def test_another_input_has_another_digest(changed):
    assert make(**changed).digest != make().digest


# --- what cannot be planned -------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (one_sink(source="v"), r"need v\[\(0,\) \+ \(4,\)\] for p.w, of which .* hold 0 of 4"),
        (one_sink(start=(2,)), "hold 2 of 4 elements; .* of the same model"),
        (SinkTable((), whole=("v",), dtypes={}, shapes={}), r"need v\[.* hold 0 of"),
    ],
)
def test_what_no_rank_holds_is_named(table, message):
    with pytest.raises(UserError, match=message):
        make_plan([worker("a", table=table)], HELD, HOSTS, chunk_bytes=1024, dtype="float32")


def test_a_chunk_holds_an_element_at_least():
    with pytest.raises(UserError, match="chunk_bytes=3 is less than an element of 4 bytes"):
        make_plan([worker("a")], HELD, HOSTS, chunk_bytes=3, dtype="float32")
