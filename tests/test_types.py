"""What travels between the stages is aligned by construction, and cannot be changed afterwards."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.samples import make_completion, make_group, make_prompt, make_sample

from megatron_dapo.types import Batch, Group, MiniBatch, Stream

# --- Completion -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": np.array([1, 2])}, "Completion.tokens must be int32 [R], got int64 [2]"),
        ({"logprobs": np.zeros(2)}, "Completion.logprobs must be float32 [R], got float64 [2]"),
        ({"trained": np.ones(2, np.int8)}, "Completion.trained must be bool [R], got int8 [2]"),
        ({"tokens": np.zeros((2, 1), np.int32)}, "Completion.tokens must be int32 [R], got int32 [2, 1]"),
    ],
)
def test_a_completion_holds_arrays_of_fixed_types(changed, message):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(make_completion([3, 4]), **changed)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "changed",
    [
        {"logprobs": [-1.0]},
        {"trained": [True] * 3},
        {"versions": ((0, 1),)},
        {"versions": ((0, 2), (1, 1))},
        {"versions": ()},
    ],
)
def test_a_completion_has_one_value_of_each_for_every_token(changed):
    with pytest.raises(
        ValueError, match="a log-probability, a mask and a weight version per token, got lengths"
    ):
        make_completion([3, 4], **changed)


def test_a_completion_is_not_empty():
    with pytest.raises(ValueError, match="Completion has no tokens"):
        make_completion([])


def test_a_completion_is_as_old_as_the_oldest_weights_that_sampled_any_of_it():
    assert make_completion([3, 4, 5], versions=((7, 1), (6, 1), (8, 1))).weight_version == 6
    assert make_completion([3], version=4).weight_version == 4


def test_a_completion_that_ended_at_the_limit_is_truncated():
    assert make_completion(finish_reason="length").truncated
    assert not make_completion(finish_reason="stop").truncated


@pytest.mark.parametrize(
    "changed",
    [
        {"logprobs": [-1.0, -1.0000001]},
        {"trained": [True, False]},
        {"versions": ((0, 1), (1, 1))},
        {"finish_reason": "length"},
        {"number": 1},
        {"seed": 0},
    ],
)
def test_completions_are_equal_in_every_bit_or_not_at_all(changed):
    one = make_completion([3, 4])
    assert one == make_completion([3, 4]) and one != make_completion([3, 5])
    assert one != make_completion([3, 4], **changed)
    assert one != "a completion"


def test_completions_are_equal_also_where_a_log_probability_is_not_a_number():
    assert make_completion(logprobs=[float("nan")]) == make_completion(logprobs=[float("nan")])


# --- Group, Sample, MiniBatch -----------------------------------------------------------


def test_a_groups_accuracy_is_the_verifiers_word_whatever_the_rewards():
    completions = tuple(make_completion(version=version) for version in (5, 3, 4))
    group = Group(
        prompt=make_prompt(),
        completions=completions,
        correct=(True, False, False),
        rewards=(1.0, -1.5, 9.0),
    )
    assert group.accuracy == 1 / 3
    assert group.weight_version == 3


@pytest.mark.parametrize(
    "streams",
    [{"correct": (True,)}, {"rewards": (1.0, 2.0)}, {"completions": make_group(size=2).completions}],
)
def test_a_group_is_aligned(streams):
    with pytest.raises(ValueError, match="Group streams must align"):
        dataclasses.replace(make_group(size=3), **streams)


def test_a_group_is_not_empty():
    with pytest.raises(ValueError, match="not be empty"):
        Group(prompt=make_prompt(), completions=(), correct=(), rewards=())


@pytest.mark.parametrize(
    "stream", [{"response_mask": [False]}, {"rollout_logprobs": [0.0]}, {"advantage": [1.0, 1.0]}]
)
def test_a_sample_is_aligned(stream):
    with pytest.raises(ValueError, match="Sample streams must align, got lengths"):
        make_sample([1, 2, 3], 2, **stream)


def test_a_sample_is_not_trained_on_its_first_token():
    make_sample([1, 2, 3], 1)
    with pytest.raises(ValueError, match="first token of a Sample has no prediction"):
        make_sample([1, 2, 3], 0)


def test_every_rank_of_a_mini_batch_has_the_same_number_of_micro_batches():
    MiniBatch(micro_batches=(((0,), (1,)), ((2,), ())), num_tokens=3, denominator=3)
    with pytest.raises(ValueError, match="same number of micro-batches"):
        MiniBatch(micro_batches=(((0,), (1,)), ((2,),)), num_tokens=3, denominator=3)


# --- Batch ------------------------------------------------------------------------------


def make_batch(**changed) -> Batch:
    """Samples of 2, 1, 3 and 2 tokens in two updates. A token is 10 times its sample plus its place in it.

    Update 0: rank 0 has sample 2, rank 1 sample 0, each with an empty second micro-batch. Update 1: rank 0
    has sample 1, rank 1 sample 3.
    """
    tokens_T = torch.tensor([0, 1, 10, 20, 21, 22, 30, 31], dtype=torch.int32)
    values = {
        "tokens_T": tokens_T,
        "response_mask_T": tokens_T % 10 > 0,
        "advantages_T": tokens_T / 8,
        "streams": {Stream.ROLLOUT_LOGPROBS: -tokens_T.float()},
        "lengths": (2, 1, 3, 2),
        "prompt_N": torch.tensor([5, 5, 6, 6]),
        "number_N": torch.tensor([0, 1, 0, 1]),
        "seed_N": torch.tensor([-1, 7, 8, 9]),
        "version_N": torch.tensor([3, 3, 4, 4]),
        "fresh_N": torch.tensor([False, False, True, True]),
        "mini_batches": (
            MiniBatch(micro_batches=(((2,), ()), ((0,), ())), num_tokens=3, denominator=30),
            MiniBatch(micro_batches=(((1,),), ((3,),)), num_tokens=1, denominator=10),
        ),
        "imbalance": 1.5,
        "fill": 0.5,
    }
    return Batch(**(values | changed))


@pytest.mark.parametrize("name", ["tokens_T", "response_mask_T", "advantages_T"])
def test_a_batch_is_as_long_as_its_samples(name):
    with pytest.raises(ValueError, match=f"Batch.{name} has 4 elements, the lengths add up to 8"):
        make_batch(**{name: torch.zeros(4)})


@pytest.mark.parametrize("name", ["prompt_N", "number_N", "seed_N", "version_N", "fresh_N"])
def test_a_batch_knows_where_every_sample_comes_from(name):
    with pytest.raises(ValueError, match=f"Batch.{name} has 3 elements for 4 samples"):
        make_batch(**{name: torch.zeros(3)})


def test_a_stream_is_as_long_as_the_batch():
    with pytest.raises(
        ValueError, match=r"Batch.streams\[old_logprobs\] has 7 elements, the lengths add up to 8"
    ):
        make_batch().with_stream(Stream.OLD_LOGPROBS, torch.zeros(7))


def test_a_new_stream_leaves_the_batch_it_was_added_to_as_it_was():
    batch, values_T = make_batch(), torch.arange(8.0)
    longer = batch.with_stream(Stream.OLD_LOGPROBS, values_T)
    assert set(batch.streams) == {Stream.ROLLOUT_LOGPROBS}
    assert longer.streams[Stream.OLD_LOGPROBS] is values_T
    assert longer.streams[Stream.ROLLOUT_LOGPROBS] is batch.streams[Stream.ROLLOUT_LOGPROBS]
    other = longer.with_stream(Stream.OLD_LOGPROBS, values_T + 1)
    assert other.streams[Stream.OLD_LOGPROBS].tolist() == list(range(1, 9))


def test_a_part_holds_the_samples_of_one_rank_renumbered_in_their_order():
    part = make_batch().part(0)  # samples 1 and 2
    assert part.tokens_T.tolist() == [10, 20, 21, 22] and part.lengths == (1, 3)
    assert part.response_mask_T.tolist() == [False, False, True, True]
    assert part.advantages_T.tolist() == [1.25, 2.5, 2.625, 2.75]
    assert part.streams[Stream.ROLLOUT_LOGPROBS].tolist() == [-10, -20, -21, -22]
    assert (part.prompt_N.tolist(), part.number_N.tolist(), part.seed_N.tolist()) == ([5, 6], [1, 0], [7, 8])
    assert (part.version_N.tolist(), part.fresh_N.tolist()) == ([3, 4], [False, True])
    assert [mini.micro_batches for mini in part.mini_batches] == [(((1,), ()),), (((0,),),)]


def test_a_part_keeps_the_types_of_what_it_holds():
    whole = make_batch()
    for rank in (0, 1):
        part = whole.part(rank)
        for name in ("tokens_T", "response_mask_T", "advantages_T", "prompt_N", "seed_N", "fresh_N"):
            assert getattr(part, name).dtype == getattr(whole, name).dtype


def test_a_part_keeps_what_describes_the_whole_step():
    part = make_batch().part(1)  # samples 0 and 3
    assert part.tokens_T.tolist() == [0, 1, 30, 31]
    assert [(mini.num_tokens, mini.denominator) for mini in part.mini_batches] == [(3, 30), (1, 10)]
    assert (part.imbalance, part.fill) == (1.5, 0.5)


def test_a_rank_without_samples_has_an_empty_part():
    mini = MiniBatch(micro_batches=(((0, 1, 2, 3),), ((),)), num_tokens=4, denominator=4)
    part = make_batch(mini_batches=(mini,)).part(1)
    assert part.tokens_T.numel() == 0 and part.lengths == () and part.prompt_N.numel() == 0
    assert part.mini_batches[0].micro_batches == (((),),)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (make_prompt(), "answer"),
        (make_completion(), "tokens"),
        (make_sample([1, 2], 1), "advantages"),
        (make_batch(), "tokens_T"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_frozen(value, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)
