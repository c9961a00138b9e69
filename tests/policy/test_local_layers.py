"""Packed attention against a softmax written out, one sequence and one head at a time."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_dapo.policy import local_layers
from megatron_dapo.policy.local_layers import PackedAttention, RMSNorm


def make_attention() -> PackedAttention:
    return PackedAttention(SimpleNamespace(attention_dropout=0.0), 1)


def params(lengths: list[int]) -> SimpleNamespace:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return SimpleNamespace(cu_seqlens_q=bounds, cp_group=None)


def explicit(query, key, value, lengths):
    heads, repeat, rows, start = query.shape[1], query.shape[1] // key.shape[1], [], 0
    for length in lengths:
        for t in range(start, start + length):
            row = []
            for h in range(heads):
                scores = torch.stack(
                    [query[t, h] @ key[s, h // repeat] for s in range(start, t + 1)]
                ) / math.sqrt(query.shape[2])
                row.append(scores.softmax(0) @ value[start : t + 1, h // repeat])
            rows.append(torch.cat(row))
        start += length
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [70, 1, 3, 33, 2, 32, 34], [2, 0, 3]])
def test_output_and_gradients(heads, kv_heads, lengths):
    draw = torch.Generator().manual_seed(1)
    shapes = [(sum(lengths), n, 8) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64) * 2 for shape in shapes]
    weights = torch.randn(sum(lengths), heads * 8, generator=draw, dtype=torch.float64)
    results = []
    for attend in (
        lambda q, k, v: make_attention()(q, k, v, packed_seq_params=params(lengths)),
        lambda q, k, v: explicit(q, k, v, lengths),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves)
        (out * weights).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_no_sequence_sees_another_or_its_own_future():
    draw = torch.Generator().manual_seed(2)
    lengths = [40, 3, 37]
    query, key, value = (torch.randn(80, 2, 8, generator=draw) for _ in range(3))
    before = make_attention()(query, key, value, packed_seq_params=params(lengths))
    key[45:], value[45:] = 9.0, 9.0  # two tokens into the third sequence
    after = make_attention()(query, key, value, packed_seq_params=params(lengths))
    assert torch.equal(before[:45], after[:45]) and not torch.allclose(before[45:], after[45:])


class OnGpu(TorchFunctionMode):
    """Every tensor says that it is on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func == torch.Tensor.is_cuda.__get__ or func(*args, **(kwargs or {}))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("dtype", "masked", "on_gpu", "kv_heads"),
    [
        (torch.bfloat16, False, True, 2),  # flash attention
        (torch.float32, False, True, 4),
        (torch.bfloat16, True, True, 4),
        (torch.float32, True, False, 2),
    ],
)
def test_a_gpu_gets_a_key_for_every_query_where_flash_attention_cannot_be(
    monkeypatch, dtype, masked, on_gpu, kv_heads
):
    asked = []

    def attend(query, key, value, **options):
        asked.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(local_layers, "scaled_dot_product_attention", attend)
    draw = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, heads, 6, 8, generator=draw).to(dtype) for heads in (4, 2, 2))
    mask = torch.ones(6, 6, dtype=torch.bool).tril() if masked else None
    expected = local_layers._attend(query, key, value, mask)
    with OnGpu() if on_gpu else contextlib.nullcontext():
        found = local_layers._attend(query, key, value, mask)
    assert asked == [(2, 2, True), (kv_heads, kv_heads, kv_heads == 2)]
    torch.testing.assert_close(found, expected)


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="attention_dropout"):
        PackedAttention(SimpleNamespace(attention_dropout=0.1), 1)


def test_rms_norm():
    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True)
    norm = RMSNorm(config, 4, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    scale = math.sqrt((1 + 4 + 9 + 16) / 4 + 0.5)
    assert norm(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == pytest.approx(
        [1 / scale, 4 / scale, 9 / scale, 16 / scale]
    )
    assert norm.weight.sequence_parallel is True
