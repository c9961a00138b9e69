"""What the recorder makes of the things that loaders do. A model here is one parameter `w` with a loader."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_dapo.sync.sink_checks import coverage_problems
from megatron_dapo.sync.sinks import Padding, Sink, SinkTable, fill
from megatron_dapo.sync.vllm.sinks_recorder import record_sinks

Load = Callable[[torch.Tensor, dict[str, torch.Tensor]], object]
torch.manual_seed(0)
TENSORS = {"a": torch.randn(4, 6), "b": torch.randn(4, 6), "c": torch.randn(12)}


class Model(torch.nn.Module):
    def __init__(self, w: torch.Tensor, load: Load) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(w)
        self.load = load

    def load_weights(self, weights) -> None:
        self.load(self.w.data, dict(weights))


def record(load: Load, shape=(4, 6), dtype=torch.float32, tensors=TENSORS) -> SinkTable:
    model = Model(torch.empty(shape, dtype=dtype, device="meta"), load)
    return record_sinks(model, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, {})


def sink(source: str, start, size, offset: int, stride) -> Sink:
    return Sink("w", source, start, size, offset, stride)


def test_a_row_parallel_slice_by_hand():
    table = record(lambda w, t: w.copy_(t["a"].narrow(1, 3, 3)), (4, 3))
    assert table.sinks == (sink("a", (0, 3), (4, 3), 0, (3, 1)),)
    assert (table.dtypes, table.shapes) == ({"w": "float32"}, {"w": (4, 3)})
    assert (table.whole, table.computed, table.padding) == ((), {}, ())


def test_a_transposed_parameter_has_swapped_strides():
    assert record(lambda w, t: w.copy_(t["a"].t()), (6, 4)).sinks == (sink("a", (0, 0), (4, 6), 0, (1, 4)),)


def test_a_parameter_that_is_kept_transposed_is_described_as_its_storage_is():
    model = Model(torch.empty(4, 6, device="meta").t(), lambda w, t: w.copy_(t["a"].t()))
    table = record_sinks(model, {"a": ((4, 6), torch.float32)}, {})
    assert table.shapes == {"w": (4, 6)}
    assert table.sinks == (sink("a", (0, 0), (4, 6), 0, (6, 1)),)


def test_rows_behind_a_constant_are_padding_unless_they_are_written_later():
    def load(w, t):
        w.zero_()
        w[4:6].fill_(2.0)
        w[:4].copy_(t["a"])

    table = record(load, (8, 6))
    assert table.padding == (
        Padding("w", 24, (2, 6), (6, 1), 2.0),
        Padding("w", 36, (2, 6), (6, 1), 0.0),
    )
    assert coverage_problems(table) == []


def interleave(w, t):
    """Row i of a beside row i of b."""
    pairs = w.view(4, 2, 6)
    pairs[:, 0].copy_(t["a"])
    pairs[:, 1].copy_(t["b"])


def halves_of_heads(w, t):
    """Two heads of two rows; their first halves before their second halves."""
    w.view(2, 2, 6).copy_(t["a"].view(2, 2, 6).transpose(0, 1))


def pieces(w, t):
    new = torch.empty(8, 6, device=t["a"].device)
    new[:4].copy_(t["a"])
    new[4:].copy_(t["b"])
    w.copy_(new[2:6])


REPLAYABLE: dict[str, tuple[tuple[int, ...], Load]] = {
    "whole": ((4, 6), lambda w, t: w.copy_(t["a"])),
    "chunk": ((2, 6), lambda w, t: w.copy_(t["a"].chunk(2)[1])),
    "clone of a slice": ((4, 3), lambda w, t: w.copy_(t["a"][:, 3:].clone())),
    "contiguous transpose": ((6, 4), lambda w, t: w.copy_(t["a"].t().contiguous())),
    "cat of slices": ((4, 6), lambda w, t: w.copy_(torch.cat([t["a"][:, 1:4], t["b"][:, :3]], dim=1))),
    "slice of a cat": ((3, 6), lambda w, t: w.copy_(torch.cat([t["a"], t["b"]])[2:5])),
    "temporary in pieces": ((4, 6), pieces),
    "other shape": ((12,), lambda w, t: w.view(3, 4).copy_(t["a"].reshape(6, 4)[1:4])),
    "vector into matrix": ((3, 4), lambda w, t: w.copy_(t["c"].view(3, 4))),
    "every other row": ((2, 6), lambda w, t: w.copy_(t["a"][::2])),
    "interleaved rows": ((8, 6), interleave),
    "halves of heads": ((4, 6), halves_of_heads),
    "one value many times": ((5, 2), lambda w, t: w.copy_(t["c"][3])),
    "rows repeated": ((4, 6), lambda w, t: w.copy_(t["a"][:2].repeat_interleave(2, dim=0))),
    "setitem": ((4, 6), lambda w, t: w.__setitem__(slice(None), t["a"])),
    "wider dtype and back": ((4, 6), lambda w, t: w.copy_(t["a"].double())),
}


@pytest.mark.parametrize("what", REPLAYABLE)
def test_replaying_gives_what_the_loader_gives(what):
    shape, load = REPLAYABLE[what]
    table = record(load, shape)
    assert coverage_problems(table) == [] and not table.computed
    loaded, filled = torch.zeros(shape), torch.zeros(shape)
    load(loaded, TENSORS)
    fill(table, {"w": filled}, TENSORS)
    assert torch.equal(loaded, filled)
    assert loaded.any()


def exponential(w, t):
    """As Mamba loads A_log."""
    w.copy_(-torch.exp(t["a"]))


def exponential_in_place(w, t):
    """As vLLM's composed_weight_loader does."""
    w.copy_(t["a"])
    w.copy_(-torch.exp(w))


def half_computed(w, t):
    w[:2].copy_(t["a"][:2])
    w[2:].copy_(t["b"][2:] * 2)


def in_a_part_of_a_storage(w, t):
    new = torch.empty(4, 8, device=t["a"].device)[:, :6]
    gaps = torch.empty_strided((4, 6), (8, 1), device=t["a"].device)
    gaps.copy_(t["a"])
    w[:2].copy_(gaps[:2])
    new.copy_(t["b"])
    w[2:].copy_(new[2:])


def half_known(w, t):
    new = torch.zeros(4, 6, device=t["a"].device)
    new[:2].copy_(t["a"][:2])
    w.copy_(new)


def written_twice(w, t):
    new = t["a"].clone()
    new[0].copy_(t["b"][0])
    w.copy_(new)


COMPUTED: dict[str, tuple[Load, tuple[str, ...], str]] = {
    "arithmetic": (exponential, ("a",), "neg"),
    "arithmetic on the parameter": (exponential_in_place, ("a",), "neg"),
    "in place": (lambda w, t: w.copy_(t["a"]).mul_(2), ("a",), "mul_"),
    "in place on a temporary": (lambda w, t: w.copy_(t["a"].clone().add_(t["b"])), ("a", "b"), "add_"),
    "a part": (half_computed, ("a", "b"), "mul"),
    "rounding": (lambda w, t: w.copy_(t["a"].bfloat16()), ("a",), "rounding to torch.bfloat16"),
    "bits": (
        lambda w, t: w.view(torch.int32).copy_(t["a"].view(torch.int32)),
        ("a",),
        "bits read as another dtype",
    ),
    "a temporary written twice": (written_twice, ("a", "b"), "a temporary that is written twice"),
    "half from nowhere": (half_known, ("a",), "values that are not in the checkpoint"),
    "gaps": (in_a_part_of_a_storage, ("a", "b"), "a temporary that does not fill its storage"),
    "fill": (lambda w, t: w.fill_(t["c"][3]), ("c",), "fill_"),
    "lookup": (lambda w, t: w.copy_(t["a"][torch.tensor([3, 2, 1, 0])]), ("a",), "index"),
}


@pytest.mark.parametrize("what", COMPUTED)
def test_tensors_that_a_loader_computes_with_are_sent_whole(what):
    load, whole, reason = COMPUTED[what]
    table = record(load)
    assert table.whole == whole
    assert table.computed == {"w": reason}
    assert table.sinks == () and coverage_problems(table) == []


def test_what_shares_a_tensor_with_a_computed_parameter_is_loaded_by_the_loader_too():
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("first", "second", "third"):
                setattr(self, name, torch.nn.Parameter(torch.empty(4, 6, device="meta")))

        def load_weights(self, weights):
            t = dict(weights)
            self.first.data.copy_(t["a"].exp())
            self.second.data[:2].copy_(t["a"][:2])
            self.second.data[2:].copy_(t["b"][2:])
            self.third.data.copy_(t["d"])

    facts = {name: ((4, 6), torch.float32) for name in "abd"}
    table = record_sinks(Shared(), facts, {"tp": 2, "tp_rank": 1})
    assert table.whole == ("a", "b")
    assert set(table.computed) == {"first", "second"}
    assert [s.source for s in table.sinks] == ["d"]
    assert (table.tp, table.tp_rank) == (2, 1)


@pytest.mark.parametrize(
    "load",
    [
        lambda w, t: None,
        lambda w, t: w.copy_(torch.ones(4, 6)),
        lambda w, t: w.copy_(torch.arange(24.0).view(4, 6) * 2),
        lambda w, t: w.mul_(2),
    ],
)
def test_values_from_nowhere_leave_a_parameter_unwritten(load):
    assert coverage_problems(record(load)) == ["w: 24 of 24 elements are never written"]


def test_a_copy_into_too_many_pieces_is_sent_whole(monkeypatch):
    from megatron_dapo.sync.vllm import sinks_recorder

    monkeypatch.setattr(sinks_recorder, "MAX_BOXES", 3)
    assert len(record(lambda w, t: w.copy_(t["a"][::2]), (2, 6)).sinks) == 2
    table = record(lambda w, t: w.copy_(t["c"][::3]), (4,))
    assert (table.whole, table.computed) == (("c",), {"w": "a copy in too many pieces"})


def test_a_loader_that_looks_at_values_says_so():
    with pytest.raises(RuntimeError, match="meta"):
        record(lambda w, t: w.fill_(t["a"].sum().item()))


def test_a_parameter_in_a_part_of_a_storage_is_refused():
    model = Model(torch.empty(4, 6, device="meta")[:, :3], lambda w, t: None)
    with pytest.raises(ValueError, match="parameter w do not fill its storage"):
        record_sinks(model, {}, {})


def test_buffers_count_when_a_tensor_is_loaded_into_them():
    class Buffers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("loaded", torch.zeros(12))
            self.register_buffer("made", torch.zeros(3))

        def load_weights(self, weights):
            self.loaded[:6].copy_(dict(weights)["c"][:6])
            self.made.fill_(1.0)

    table = record_sinks(Buffers(), {"c": ((12,), torch.float32)}, {})
    assert table.shapes == {"loaded": (12,)}
    assert coverage_problems(table) == ["loaded: 6 of 12 elements are never written"]
