"""Pairs of responses, their margins wherever the two are, and a loss over tokens that is DPO's."""

from __future__ import annotations

import pytest
import torch
from support.cases import plan
from support.samples import make_completion, make_group, make_prompt

from megatron_dapo.config import DpoConfig
from megatron_dapo.layout import Layout
from megatron_dapo.objectives import make_objective
from megatron_dapo.objectives.base import TokenInputs
from megatron_dapo.objectives.dpo import best_and_worst, num_pairs
from megatron_dapo.types import Batch, Group, Stream

BETA = 0.5


def group(rewards: list[float], position: int = 0, *, shortest: int = 1) -> Group:
    """Each response is a token longer than the one before it."""
    return make_group(
        make_prompt(position), rewards=rewards, lengths=range(shortest, shortest + len(rewards))
    )


def numbers(groups: list[Group]) -> list[tuple[int, float]]:
    return [(s.number, float(s.advantages[0])) for s in best_and_worst(groups)]


def test_the_best_and_the_worst_of_each_group():
    assert numbers([group([0.0, 2.0, -1.0]), group([-1.0, 1.0], 1)]) == [(1, 1), (2, -1), (1, 1), (0, -1)]


def test_the_first_of_equal_ones():
    assert numbers([group([1.0, -1.0, 1.0, -1.0])]) == [(0, 1), (1, -1)]


def test_a_group_with_equal_rewards_has_no_pair():
    assert numbers([group([1.0, 1.0]), group([1.0, -1.0], 1)]) == [(0, 1), (1, -1)]


def test_masked_responses_are_in_no_pair():
    masked = Group(
        prompt=make_prompt(),
        completions=(
            make_completion((5,), number=0, trained=[False]),
            make_completion((5, 6), number=1),
            make_completion((5, 6, 7), number=2),
        ),
        correct=(None, True, False),
        rewards=(9.0, 1.0, -1.0),
    )
    assert numbers([masked]) == [(1, 1), (2, -1)]


def test_a_step_without_a_pair_has_nothing_to_train():
    (sample,) = best_and_worst([group([1.0, 1.0]), group([0.0, 0.0], 1)])
    assert not sample.response_mask.any()
    assert num_pairs([sample]) == 1


def test_pairs_are_counted():
    assert num_pairs(best_and_worst([group([1.0, 0.0]), group([1.0, 0.0], 1)])) == 2


# --- two pairs: responses of 1 and 2 tokens, and of 4 and 3


def batch(**streams: torch.Tensor) -> Batch:
    samples = best_and_worst([group([1.0, 0.0], 7), group([0.0, 1.0], (1 << 20) + 8, shortest=3)])
    whole = plan(samples, Layout(dp=2), num_updates=1, budget="one", denominator=num_pairs)
    for name, values in streams.items():
        whole = whole.with_stream(Stream(name), values)
    return whole


def log_ratios() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    size = int(batch().tokens_T.numel())
    return tuple(-3 * torch.rand(size, generator=draw) for _ in range(2))  # type: ignore[return-value]


def expected_margins(old_T: torch.Tensor, reference_T: torch.Tensor) -> list[torch.Tensor]:
    """Of both pairs, by a loop over samples in pairs."""
    whole, scores, start = batch(), [], 0
    for length in whole.lengths:
        mask = whole.response_mask_T[start : start + length]
        scores.append((old_T - reference_T)[start : start + length][mask].sum())
        start += length
    return [BETA * (scores[0] - scores[1]), BETA * (scores[2] - scores[3])]


def prepared(old_T: torch.Tensor, reference_T: torch.Tensor) -> tuple[Batch, list[Batch]]:
    """The whole batch, and both data-parallel parts, whose margins take both parts' sums."""
    prepare = make_objective(DpoConfig(beta=BETA)).prepare
    whole = batch(old_logprobs=old_T, reference_logprobs=reference_T)
    own: list[torch.Tensor] = []
    for rank in range(2):
        prepare(whole.part(rank), lambda sums: (own.append(sums), sums)[1])
    parts = [prepare(whole.part(rank), lambda _: own[0] + own[1]) for rank in range(2)]
    return prepare(whole, lambda sums: sums), parts


def test_the_two_of_a_pair_may_be_on_different_ranks():
    old_T, reference_T = log_ratios()
    whole, parts = prepared(old_T, reference_T)
    assert any(len(set(part.prompt_N.tolist())) == 2 for part in parts), (
        "a pair that is not split shows nothing"
    )
    first, second = expected_margins(old_T, reference_T)
    for found in (whole, *parts):
        margins_N = [m[0] for m in found.streams[Stream.MARGINS].split(list(found.lengths))]
        wanted = [first if position == 7 else second for position in found.prompt_N.tolist()]
        torch.testing.assert_close(torch.stack(margins_N), torch.stack(wanted))


def inputs(found: Batch, logprobs_T: torch.Tensor, rows: torch.Tensor) -> TokenInputs:
    sample_T = torch.arange(len(found.lengths)).repeat_interleave(torch.tensor(found.lengths))
    return TokenInputs(
        logprobs_R=logprobs_T[rows],
        entropy_R=torch.ones(len(rows)),
        advantages_R=found.advantages_T[rows],
        fresh_R=torch.ones(len(rows), dtype=torch.bool),
        samples_R=sample_T[rows],
        num_samples=len(found.lengths),
        streams={name: values_T[rows] for name, values_T in found.streams.items()},
    )


def test_loss_and_gradient_over_tokens_are_those_of_the_paper():
    """Before an update the policy's log-probabilities are the old ones."""
    old_T, reference_T = (x.double() for x in log_ratios())
    of_paper_T = old_T.clone().requires_grad_()
    margins = torch.stack(expected_margins(of_paper_T, reference_T))
    paper = -torch.nn.functional.logsigmoid(margins).mean()
    paper.backward()
    margins = margins.detach()

    whole, _ = prepared(old_T.float(), reference_T.float())
    logprobs_T = old_T.clone().requires_grad_()
    terms = make_objective(DpoConfig(beta=BETA)).loss(
        inputs(whole, logprobs_T, whole.response_mask_T.nonzero()[:, 0])
    )
    (terms.loss / num_pairs([None] * 4)).backward()  # type: ignore[list-item]
    assert float(terms.loss.detach()) / 2 == pytest.approx(float(paper.detach()), rel=1e-6)
    torch.testing.assert_close(logprobs_T.grad, of_paper_T.grad, rtol=1e-6, atol=1e-9)
    assert float(terms.metrics["margin"].value) == pytest.approx(sum(map(float, margins)) / 2, rel=1e-6)
    assert float(terms.metrics["dpo_accuracy"].value) == sum(m > 0 for m in margins) / 2


def test_micro_batches_add_up():
    old_T, reference_T = log_ratios()
    whole, _ = prepared(old_T, reference_T)
    loss = make_objective(DpoConfig(beta=BETA)).loss
    rows = whole.response_mask_T.nonzero()[:, 0]
    sample_T = torch.arange(4).repeat_interleave(torch.tensor(whole.lengths))
    parts = [loss(inputs(whole, old_T, rows[sample_T[rows] % 2 == k])) for k in range(2)]
    assert float(sum(p.loss for p in parts)) == pytest.approx(float(loss(inputs(whole, old_T, rows)).loss))


def test_an_aged_run_corrects_nothing():
    assert DpoConfig().resolved(max_age=2).mismatch_correction == "auto"
