"""What a micro-batch holds, by hand."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from megatron_dapo.layout import Layout
from megatron_dapo.policy.forward import make_micro_batch, response_logprobs, run_model
from megatron_dapo.types import Batch, MiniBatch, Stream

# Three samples of 3, 4 and 2 tokens; the second has a response of 2, the third one of 1, the first one is
# masked out
BATCH = Batch(
    tokens_T=torch.tensor([10, 11, 12, 20, 21, 22, 23, 30, 31], dtype=torch.int32),
    response_mask_T=torch.tensor([False, False, False, False, False, True, True, False, True]),
    advantages_T=torch.tensor([1.0, 1, 1, 0, 0, 2.0, 2.5, 3, 3]),
    streams={
        Stream.ROLLOUT_LOGPROBS: torch.tensor([0, 0, -0.1, 0, 0, -0.2, -0.3, 0, -0.4]),
        Stream.VALUES: torch.arange(9.0),
    },
    lengths=(3, 4, 2),
    prompt_N=torch.tensor([5, 5, 6]),
    number_N=torch.tensor([0, 1, 0]),
    seed_N=torch.tensor([-1, -1, -1]),
    version_N=torch.tensor([2, 1, 2]),
    fresh_N=torch.tensor([True, False, True]),
    mini_batches=(),
    imbalance=1.0,
    fill=1.0,
)
STARTS = [0, *itertools.accumulate(BATCH.lengths)]


def micro(indices, align=1, cp=1, cp_rank=0):
    return make_micro_batch(
        BATCH, indices, STARTS, layout=Layout(cp=cp), cp_rank=cp_rank, align=align, device="cpu"
    )


def test_two_samples_in_another_order():
    found = micro((2, 1))
    assert found.tokens_1T.tolist() == [[30, 31, 20, 21, 22, 23]]
    assert found.positions_1T.tolist() == [[0, 1, 0, 1, 2, 3]]
    assert found.bounds.tolist() == [0, 2, 6] and found.bounds.dtype == torch.int32 and found.max_length == 4
    assert found.rows_R.tolist() == [0, 3, 4]  # each predicts the next token
    assert found.labels_R.tolist() == [31, 22, 23]
    assert found.streams_R[Stream.ROLLOUT_LOGPROBS].tolist() == pytest.approx([-0.4, -0.2, -0.3])
    assert found.streams_R[Stream.VALUES].tolist() == [8, 5, 6]  # every stream of the batch is there
    assert found.advantages_R.tolist() == [3.0, 2.0, 2.5]
    assert found.fresh_R.tolist() == [True, False, False]
    assert found.samples_R.tolist() == [0, 1, 1]  # in the order of this micro-batch
    assert found.flat_R.tolist() == [8, 5, 6]


def test_the_micro_batch_drawn_in_the_docstring():
    found = micro((2, 1), align=4)
    assert found.bounds.tolist() == [0, 2, 6, 8] and found.num_samples == 3
    assert found.positions_1T.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]]
    assert (found.rows_R.tolist(), found.labels_R.tolist()) == ([0, 3, 4], [31, 22, 23])
    assert (found.flat_R.tolist(), found.samples_R.tolist()) == ([8, 5, 6], [0, 1, 1])


def test_tokens_are_int64_as_embeddings_and_gathers_take_them():
    found = micro((1,))
    assert found.tokens_1T.dtype == found.labels_R.dtype == torch.int64


def test_a_masked_sample_is_run_but_not_trained_on():
    found = micro((0,))
    assert (
        found.tokens_1T.tolist() == [[10, 11, 12]]
        and found.rows_R.tolist() == []
        and found.flat_R.tolist() == []
    )


def test_padding_is_a_sequence_of_its_own():
    found = micro((2, 0), align=4)
    assert found.tokens_1T.tolist() == [[30, 31, 10, 11, 12, 0, 0, 0]]
    assert found.positions_1T.tolist() == [[0, 1, 0, 1, 2, 0, 1, 2]]
    assert found.bounds.tolist() == [0, 2, 5, 8] and found.max_length == 3
    assert found.rows_R.tolist() == [0]


def test_context_parallel_ranks_hold_the_outer_and_the_inner_chunks():
    outer, inner = (micro((2, 1), cp=2, cp_rank=rank) for rank in (0, 1))
    assert outer.tokens_1T.tolist() == [[30, 0, 20, 23]] and outer.positions_1T.tolist() == [[0, 3, 0, 3]]
    assert inner.tokens_1T.tolist() == [[31, 0, 21, 22]] and inner.positions_1T.tolist() == [[1, 2, 1, 2]]
    for found in (outer, inner):
        assert found.bounds.tolist() == [0, 4, 8] and found.max_length == 4  # of the whole sequences
    assert (outer.rows_R.tolist(), outer.labels_R.tolist(), outer.flat_R.tolist()) == ([0], [31], [8])
    assert (inner.rows_R.tolist(), inner.labels_R.tolist(), inner.flat_R.tolist()) == (
        [2, 3],
        [22, 23],
        [5, 6],
    )
    assert inner.advantages_R.tolist() == [2.0, 2.5] and inner.samples_R.tolist() == [1, 1]


def test_every_context_parallel_share_is_aligned():
    found = [micro((2,), cp=2, cp_rank=rank, align=3) for rank in (0, 1)]
    assert [f.tokens_1T.shape[1] for f in found] == [
        6,
        6,
    ]  # 4 tokens and a filler of 8 make 12, a multiple of 4 and of 2 x 3
    assert found[0].bounds.tolist() == [0, 4, 12]


def test_no_padding_where_it_fits():
    assert micro((1,), align=4).bounds.tolist() == [0, 4]


@pytest.mark.parametrize("align", [1, 2, 4])
def test_an_empty_micro_batch_is_padding_alone(align):
    found = micro((), align=align)
    assert found.tokens_1T.tolist() == [[0] * align] and found.bounds.tolist() == [0, align]
    assert all(
        len(x) == 0 for x in (found.rows_R, found.labels_R, found.advantages_R, found.samples_R, found.flat_R)
    )


def test_a_part_without_samples_is_padding_alone():
    """A data-parallel rank that a small step has no sample for."""
    empty = dataclasses.replace(
        BATCH, mini_batches=(MiniBatch(micro_batches=(((0, 1, 2),), ((),)), num_tokens=3, denominator=3),)
    ).part(1)
    found = make_micro_batch(empty, (), [0], layout=Layout(), cp_rank=0, align=4, device="cpu")
    assert found.tokens_1T.tolist() == [[0] * 4] and len(found.labels_R) == len(found.fresh_R) == 0


def test_logprobs_at_a_temperature_without_the_padded_vocabulary():
    found = micro((1,))
    hidden = torch.tensor([9.0, 2.0, 2.0, 9.0])[
        :, None, None
    ]  # rows 1 and 2 predict; the logits are hidden x weight
    weight = torch.zeros(26, 1)
    weight[22], weight[24:] = 1.0, 25.0  # 24 and 25 are padding
    session = SimpleNamespace(tp_rank=0, tp_group=None)
    logprobs, entropy = response_logprobs(hidden, weight, found, session, vocab_size=24, temperature=0.5)
    exp4 = torch.tensor(4.0, dtype=torch.float64).exp()
    log_z = (exp4 + 23).log()
    assert logprobs.tolist() == pytest.approx([float(4 - log_z), float(-log_z)], rel=1e-6)
    assert entropy.tolist() == pytest.approx([float(log_z - 4 * exp4 / (exp4 + 23))] * 2, rel=1e-6)


@pytest.mark.parametrize(("bf16", "asked"), [(True, {"fp32_output": False}), (False, {})])
def test_hidden_states_of_all_tokens_are_not_copied_to_fp32(bf16, asked):
    """Megatron's Float16Module does so unless it is told otherwise; without it nobody knows the word."""

    class Chunk:
        config = SimpleNamespace(bf16=bf16)

        def __call__(self, tokens, positions, mask, *, packed_seq_params, **options):
            return options

    assert run_model(Chunk(), micro([0]), SimpleNamespace(cp_group=None)) == asked  # type: ignore[arg-type]
