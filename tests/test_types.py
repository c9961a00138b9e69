"""What travels between the stages is aligned by construction, and cannot be changed afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_dapo.types import Batch, Completion, Group, MiniBatch, Prompt, Sample

PROMPT = Prompt(position=0, row=0, text="q", answer="1", tokens=(1, 2))


def make_completion(version: int = 0, **changed) -> Completion:
    return Completion(
        **{"tokens": (3, 4), "logprobs": (-0.5, -1.0), "finish_reason": "stop", "weight_version": version, **changed}
    )


def make_sample(**changed) -> Sample:
    values = {"tokens": (1, 2, 3), "response_mask": (False, False, True), "rollout_logprobs": (0.0, 0.0, -0.5)}
    return Sample(**{**values, "advantage": 1.0, "weight_version": 0, "prompt_position": 0, **changed})


def make_batch(**changed) -> Batch:
    values = {
        "tokens_T": torch.zeros(5, dtype=torch.int64),
        "response_mask_T": torch.zeros(5, dtype=torch.bool),
        "rollout_logprobs_T": torch.zeros(5),
        "advantages_N": torch.zeros(2),
        "lengths": (2, 3),
        "fresh_N": torch.ones(2, dtype=torch.bool),
        "mini_batches": (MiniBatch(micro_batches=(((0, 1),),), num_tokens=3),),
        "imbalance": 1.0,
        "fill": 1.0,
    }
    return Batch(**{**values, **changed})


def test_a_completion_has_a_logprob_for_every_token():
    with pytest.raises(ValueError, match="log-probability per token, got 1 for 2"):
        make_completion(logprobs=(-0.5,))
    with pytest.raises(ValueError, match="Completion has no tokens"):
        make_completion(tokens=(), logprobs=())
    assert not make_completion().truncated and make_completion(finish_reason="length").truncated


def test_a_group_is_aligned_and_not_empty():
    completions = (make_completion(5), make_completion(3), make_completion(4))
    group = Group(prompt=PROMPT, completions=completions, correct=(True, False, False), rewards=(1.0, -1.5, 9.0))
    assert group.accuracy == 1 / 3  # the verifier's word, whatever the rewards
    assert group.weight_version == 3
    for streams in ({"correct": (True,)}, {"rewards": (1.0, 2.0)}, {"completions": completions[:2]}):
        with pytest.raises(ValueError, match="Group streams must align"):
            dataclasses.replace(group, **streams)
    with pytest.raises(ValueError, match="not be empty"):
        Group(prompt=PROMPT, completions=(), correct=(), rewards=())


def test_a_sample_is_aligned_and_predicts_no_first_token():
    make_sample()
    for stream in ({"tokens": (1, 2)}, {"response_mask": (False, True)}, {"rollout_logprobs": (0.0,)}):
        with pytest.raises(ValueError, match="Sample streams must align, got lengths"):
            make_sample(**stream)
    with pytest.raises(ValueError, match="first token of a Sample has no prediction"):
        make_sample(response_mask=(True, False, True))


def test_every_rank_has_the_same_number_of_micro_batches():
    MiniBatch(micro_batches=(((0,), (1,)), ((2,), ())), num_tokens=3)
    with pytest.raises(ValueError, match="same number of micro-batches"):
        MiniBatch(micro_batches=(((0,), (1,)), ((2,),)), num_tokens=3)


@pytest.mark.parametrize("name", ["tokens_T", "response_mask_T", "rollout_logprobs_T"])
def test_a_batch_is_as_long_as_its_samples(name):
    make_batch()
    with pytest.raises(ValueError, match=f"Batch.{name} has 4 elements, the lengths add up to 5"):
        make_batch(**{name: torch.zeros(4)})


def test_a_batch_has_an_advantage_for_every_sample():
    with pytest.raises(ValueError, match="advantages_N has 3 elements for 2 samples"):
        make_batch(advantages_N=torch.zeros(3))


@pytest.mark.parametrize(("value", "field"), [(PROMPT, "answer"), (make_completion(), "tokens"), (make_sample(), "advantage")])
def test_values_are_frozen(value, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)
