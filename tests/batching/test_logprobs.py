"""Log-probabilities from hidden states against torch's log_softmax of all the logits, in float64."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from support.ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dapo.batching.logprobs import logprobs_from_hidden

TOKENS, VOCAB, HIDDEN = 6, 10, 4
PADDED = 12


def make(rows: int = TOKENS, *, scale: float = 2.0, vocab: int = VOCAB) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight of the output layer, labels, and the gradients that arrive at the
    log-probabilities.
    """
    draw = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(rows, HIDDEN, generator=draw) * scale,
        torch.randn(vocab, HIDDEN, generator=draw),
    )
    return hidden, weight, torch.randint(vocab, (rows,), generator=draw), torch.randn(rows, generator=draw)


def padded(weight: torch.Tensor, rows: int = PADDED) -> torch.Tensor:
    """With vocabulary rows whose logits would dwarf all others."""
    return torch.cat([weight, torch.full((rows - len(weight), weight.shape[1]), 50.0)])


def reference(
    hidden, weight, labels, arriving, temperature: float = 1.0, at_entropy: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Log-probabilities, entropy, gradient of hidden, gradient of weight; fp32 results of a float64
    computation. at_entropy: the gradients that arrive at the entropy.
    """
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    logs = (leaves[0] @ leaves[1].T / temperature).log_softmax(-1)
    logprobs, entropy = logs.gather(1, labels[:, None]).squeeze(1), -(logs.exp() * logs).sum(-1)
    total = (logprobs * arriving).sum() + (0 if at_entropy is None else (entropy * at_entropy).sum())
    gradients = torch.autograd.grad(total, leaves)
    return [x.detach().float() for x in (logprobs, entropy, *gradients)]


def found(
    hidden, weight, labels, arriving, *, vocab_size: int = VOCAB, at_entropy=None, **options
) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    options["entropy_gradient"] = at_entropy is not None
    logprobs, entropy = logprobs_from_hidden(*leaves, labels, vocab_size=vocab_size, **options)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert entropy.requires_grad == (at_entropy is not None)
    total = (logprobs * arriving).sum() + (0 if at_entropy is None else (entropy * at_entropy).sum())
    gradients = torch.autograd.grad(total, leaves)
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves]
    return [logprobs.detach(), entropy.detach(), *gradients]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for now, other in zip(found, expected, strict=True):
        torch.testing.assert_close(now, other, rtol=1e-5, atol=1e-5)


# A token's logits take 40 bytes and a vocabulary row's 24, so that these are blocks of 1 token / 1 row (the
# least there is), 1 / 2, 4 / 6 (the last blocks are 2 and 4), 6 / 10 and everything at once
@pytest.mark.parametrize("block_bytes", [1, 48, 160, 240, 1 << 20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_blocks_do_not_change_the_result(block_bytes, temperature):
    inputs = make()
    assert_equal(
        found(*inputs, block_bytes=block_bytes, temperature=temperature), reference(*inputs, temperature)
    )


@pytest.mark.parametrize("block_bytes", [1, 160, 1 << 20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_has_a_gradient_where_it_is_asked_for(block_bytes, temperature):
    hidden, weight, labels, arriving = make()
    at_entropy = torch.linspace(-1, 2, len(labels))
    options = {"block_bytes": block_bytes, "temperature": temperature, "at_entropy": at_entropy}
    *others, grad_weight = found(hidden, padded(weight), labels, arriving, **options)
    wanted = reference(hidden, weight, labels, arriving, temperature, at_entropy)
    assert_equal([*others, grad_weight[:VOCAB]], wanted)
    assert torch.equal(grad_weight[VOCAB:], torch.zeros(PADDED - VOCAB, HIDDEN))
    without = reference(hidden, weight, labels, arriving, temperature)
    assert float((wanted[2] - without[2]).norm()) > 0.1


@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_the_entropys_gradient_of_flat_and_steep_distributions(scale):
    inputs = make(scale=scale)
    at_entropy = torch.ones(TOKENS)
    for now, other in zip(
        found(*inputs, at_entropy=at_entropy), reference(*inputs, at_entropy=at_entropy), strict=True
    ):
        torch.testing.assert_close(now, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_any_number_of_tokens(rows):
    inputs = make(rows)
    assert_equal(found(*inputs, block_bytes=80), reference(*inputs))


def test_no_token_has_a_gradient_of_zero():
    hidden, weight, labels, arriving = make(0)
    logprobs, entropy, grad_hidden, grad_weight = found(hidden, padded(weight), labels, arriving)
    assert logprobs.shape == entropy.shape == (0,) and grad_hidden.shape == (0, HIDDEN)
    assert torch.equal(grad_weight, torch.zeros(PADDED, HIDDEN))


@pytest.mark.parametrize("scale", [0.0, 5.0, 100.0])
def test_flat_and_steep_distributions(scale):
    inputs = make(scale=scale)
    for now, other in zip(found(*inputs), reference(*inputs), strict=True):
        torch.testing.assert_close(
            now, other, rtol=1e-4, atol=1e-3 if scale == 100 else 1e-5
        )  # logits of some 300 in fp32


def test_huge_logits_do_not_overflow():
    weight = torch.tensor([[3e4], [0.0], [-3e4]])
    logprobs, entropy = logprobs_from_hidden(torch.ones(2, 1), weight, torch.tensor([0, 1]), vocab_size=3)
    assert (logprobs.tolist(), entropy.tolist()) == ([0.0, -3e4], [0.0, 0.0])


def test_padding_of_the_vocabulary_has_no_part():
    hidden, weight, labels, arriving = make()
    for block_bytes in (1, 100, 1 << 20):
        *others, grad_weight = found(hidden, padded(weight), labels, arriving, block_bytes=block_bytes)
        assert_equal([*others, grad_weight[:VOCAB]], reference(hidden, weight, labels, arriving))
        assert torch.equal(grad_weight[VOCAB:], torch.zeros(PADDED - VOCAB, HIDDEN))


def test_by_hand():
    hidden, weight = (
        torch.tensor([[1.0]], requires_grad=True),
        torch.tensor([[math.log(3.0)], [0.0]], requires_grad=True),
    )
    logprobs, entropy = logprobs_from_hidden(hidden, weight, torch.tensor([0]), vocab_size=2, temperature=0.5)
    logprobs.sum().backward()  # odds 9 : 1
    assert float(logprobs.detach()) == pytest.approx(math.log(0.9))
    assert float(entropy) == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert weight.grad.tolist() == [[pytest.approx(0.1 / 0.5)], [pytest.approx(-0.1 / 0.5)]]
    assert hidden.grad.tolist() == [[pytest.approx(0.1 / 0.5 * math.log(3.0))]]


def test_bf16_is_as_near_as_bf16_logits_are():
    hidden, weight, labels, arriving = (
        x.bfloat16() if x.is_floating_point() else x for x in make(200, vocab=300)
    )
    expected = reference(hidden, weight, labels, arriving.double())
    now = found(
        hidden, weight, labels, arriving.float(), vocab_size=300, block_bytes=40_000
    )  # 33 tokens, 50 rows
    for ours, theirs in zip(now, expected, strict=True):
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 0.01


class _Blocks(TorchDispatchMode):
    """The most tensors of `numel` elements or more that were alive at once, of those that operations
    returned.
    """

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.most, self._returned = numel, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = (x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
        self._returned = [ref for ref in self._returned if ref() is not None]
        self._returned += [weakref.ref(x) for x in tensors if x.numel() >= self.numel]
        alive = [ref() for ref in self._returned]
        self.most = max(self.most, len({x.untyped_storage().data_ptr() for x in alive}))
        return result


def test_few_blocks_of_logits_are_alive_at_once():
    hidden, weight, labels, arriving = make(64, vocab=500)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    forward, backward, too_large = _Blocks(3900), _Blocks(3900), _Blocks(4001)
    with too_large:
        with forward:
            logprobs, _ = logprobs_from_hidden(
                *leaves, labels, vocab_size=500, block_bytes=16_000
            )  # 8 tokens x 500, 62 x 64 tokens
        with backward:
            torch.autograd.grad((logprobs * arriving).sum(), leaves)
    assert (forward.most, backward.most, too_large.most) == (2, 1, 0)  # all logits are 32,000


def test_two_shards_equal_the_whole():
    """Both have six rows of the vocabulary, the second one padding; 2 tokens or 2 rows to a block."""
    inputs = make()
    hidden, weight, labels, arriving = inputs
    logprobs, entropy, grad_hidden, grad_weight = reference(*inputs, 0.7)
    assert 0 < sum(labels < 6) < TOKENS  # labels on both sides
    by_rank = run_ranks(
        "support.jobs_objectives:logprobs_of_shards",
        2,
        hidden=hidden.tolist(),
        weight=padded(weight).tolist(),
        labels=labels.tolist(),
        arriving=arriving.tolist(),
        options={"vocab_size": VOCAB, "temperature": 0.7, "block_bytes": 48},
    )
    first, second = ([torch.tensor(x) for x in rank] for rank in by_rank)
    for rank in (first, second):
        assert_equal(rank[:2], [logprobs, entropy])
    assert_equal([first[2] + second[2]], [grad_hidden])  # each rank's share
    padding = torch.zeros(PADDED - VOCAB, HIDDEN)
    assert_equal([torch.cat([first[3], second[3]])], [torch.cat([grad_weight, padding])])
    assert torch.equal(first[0], second[0])
