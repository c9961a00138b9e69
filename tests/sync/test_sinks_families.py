"""Sink tables of every model family, from vLLM's own loaders in a pretended world: the checks find nothing,
and filling from the table gives the bits that the real loader gives."""

from __future__ import annotations

import pytest
import torch
from support.sink_models import Checkpoint, differing, make_checkpoint

from megatron_dapo.sync.sink_checks import problems
from megatron_dapo.sync.sinks import SinkTable

FAMILIES = [  # Qwen2.5 is qwen2
    ("qwen2", True),
    ("qwen2", False),
    ("qwen3", True),
    ("qwen3", False),
    ("llama", True),
    ("llama", False),
    ("mistral", False),
    ("qwen3_moe", True),
    ("qwen3_moe", False),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: f"{family[0]}-tied{int(family[1])}")
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    arch, tied = request.param
    return make_checkpoint(tmp_path_factory.mktemp(arch), arch, tied=tied)


def check(checkpoint: Checkpoint, **layout) -> list[SinkTable]:
    """The tables of all ranks, when nothing is wrong with them."""
    from megatron_dapo.sync.vllm import sinks_pretend

    config = sinks_pretend.engine_config(checkpoint.folder, **layout)
    tables = sinks_pretend.tables_without_engine(config, checkpoint.facts)
    assert problems(tables, checkpoint.shapes) == []
    assert all(table.whole == () and table.computed == {} for table in tables)
    for rank, table in enumerate(tables):
        with sinks_pretend.pretend(config, rank):
            assert list(differing(config, table, checkpoint.tensors)) == []
    return tables


# The models have 8 heads and 2 key/value heads, which tp ranks share at tp 4 and 8.
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2)])
def test_tables_fill_what_the_loader_fills(checkpoint, tp, pp):
    tables = check(checkpoint, tp=tp, pp=pp, dtype="float32")
    assert [(t.pp_rank, t.tp_rank) for t in tables] == [(i, j) for i in range(pp) for j in range(tp)]
    assert {(t.pp, t.tp, t.ep, t.ep_rank) for t in tables} == {(pp, tp, 1, 0)}


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (2, 2)])
def test_expert_parallel(tmp_path, tp, pp):
    tables = check(make_checkpoint(tmp_path, "qwen3_moe", tied=False), tp=tp, pp=pp, expert_parallel=True)
    for table in tables:
        assert (table.ep, table.ep_rank) == (tp, table.tp_rank)
        experts = {int(s.source.split(".")[5]) for s in table.sinks if ".experts." in s.source}
        share = 8 // tp
        assert experts == set(range(share * table.ep_rank, share * (table.ep_rank + 1)))
        up = next(s for s in table.sinks if s.source.endswith("up_proj.weight"))
        assert up.size == (16, 64)  # whole experts


def test_the_engine_may_have_another_dtype(tmp_path):
    checkpoint = make_checkpoint(tmp_path, "qwen2", tied=False)
    [table] = check(checkpoint, dtype="bfloat16")
    assert set(table.dtypes.values()) == {"bfloat16"}
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32}
    # embedding and head have 301 rows, padded to 320
    assert table.num_elements == sum(tensor.numel() for tensor in checkpoint.tensors.values())
    assert table.num_bytes == 2 * table.num_elements
    assert [(p.parameter, p.offset, p.size) for p in table.padding] == [
        ("lm_head.weight", 301 * 64, (19, 64)),
        ("model.embed_tokens.weight", 301 * 64, (19, 64)),
    ]
