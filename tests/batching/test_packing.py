"""Properties of every packing, some by hand, and 8,192 samples on 128 ranks."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.samples import make_sample

from megatron_dapo.batching import packing
from megatron_dapo.batching.packing import Cost, best_fit, deal_out, plan, share_out
from megatron_dapo.objectives.base import trained_tokens
from megatron_dapo.types import Batch, Sample, Stream

SIZES_32B = {"num_layers": 64, "hidden_size": 5120, "num_heads": 40, "num_kv_heads": 8, "head_dim": 128}
QWEN32B = Cost.of_model(**SIZES_32B, ffn_size=27648, vocab_size=152064)
TOKENS = Cost()


def pack(samples: Sequence[Sample], **how) -> Batch:
    """Trained at version 0 and divided by tokens, unless said otherwise."""
    return packing.pack(samples, **({"version": 0, "denominator": trained_tokens} | how))


def sample(
    prompt: int, response: int, *, trained: bool = True, version: int = 0, advantage: float = 0.0
) -> Sample:
    return make_sample(
        range(prompt + response),
        prompt,
        response_mask=[False] * prompt + [trained] * response,
        advantage=advantage,
        weight_version=version,
    )


def of_lengths(*lengths: int) -> list[Sample]:
    return [sample(1, length - 1) for length in lengths]


ANY_SAMPLE = st.builds(
    sample, st.integers(1, 20), st.integers(1, 100), trained=st.booleans(), version=st.integers(0, 1)
)
SAMPLES = st.lists(ANY_SAMPLE, min_size=1, max_size=30)
COSTS = st.builds(Cost, st.floats(0.1, 10), st.floats(0, 1))


# --- properties -------------------------------------------------------------------------


@given(
    samples=SAMPLES,
    dp=st.integers(1, 4),
    num_updates=st.integers(1, 4),
    slack=st.integers(0, 200),
    least=st.integers(1, 5),
    align=st.integers(1, 9),
    multiple=st.integers(1, 4),
    cost=COSTS,
)
def test_every_packing(samples, dp, num_updates, slack, least, align, multiple, cost):
    num_updates = min(num_updates, len(samples))
    padded = [math.ceil(len(s.tokens) / align) * align for s in samples]
    budget = max(padded) + slack
    batch = pack(
        samples,
        dp=dp,
        num_updates=num_updates,
        max_tokens=budget,
        cost=cost,
        align=align,
        multiple=multiple,
        min_micro_batches=least,
    )
    assert batch.lengths == tuple(len(s.tokens) for s in samples)
    assert len(batch.mini_batches) == num_updates
    done = 0
    for mini in batch.mini_batches:
        assert len(mini.micro_batches) == dp
        (count,) = {len(rank) for rank in mini.micro_batches}
        assert count >= least and count % multiple == 0
        for rank in mini.micro_batches:
            assert all(sum(padded[i] for i in micro) <= budget for micro in rank)
            costs = [sum(cost(padded[i]) for i in micro) for micro in rank]
            assert all(a >= b * (1 - 1e-9) for a, b in zip(costs, costs[1:], strict=False))
        inside = sorted(i for rank in mini.micro_batches for micro in rank for i in micro)
        assert inside == list(
            range(done, done + len(inside))
        )  # every sample once, in mini-batches as they came
        assert abs(len(inside) - len(samples) / num_updates) < 1
        assert mini.num_tokens == sum(int(samples[i].response_mask.sum()) for i in inside)
        assert mini.denominator == mini.num_tokens
        # of two micro-batches that best fit opens, one is more than half full; beyond that only rounding adds
        # any
        enough = max(2 * sum(padded[i] for i in inside) // (budget // align * align) + 1, least * dp)
        assert count * dp < enough + dp * multiple
        done += len(inside)
    assert done == len(samples)


@given(SAMPLES, st.integers(1, 4), st.integers(0, 50), st.integers(1, 8))
def test_mini_batches_depend_on_neither_layout_nor_budget_nor_alignment(samples, dp, slack, align):
    def members(**how):
        batch = pack(samples, num_updates=min(2, len(samples)), **how)
        return [
            sorted(i for rank in mini.micro_batches for micro in rank for i in micro)
            for mini in batch.mini_batches
        ]

    longest = max(len(s.tokens) for s in samples)
    assert members(dp=dp, max_tokens=longest + align + slack, align=align) == members(dp=1, max_tokens=10**6)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 6), COSTS)
def test_with_room_for_all_no_rank_is_a_sample_above_the_mean(lengths, dp, cost):
    """Graham's bound of scheduling to the least loaded: max <= mean + (1 - 1/dp) x the costliest sample."""
    costs = rank_costs(plan(lengths, dp=dp, max_tokens=4000, cost=cost), lengths, cost)
    assert max(costs) <= (fmean(costs) + (1 - 1 / dp) * cost(max(lengths))) * (1 + 1e-9)


def rank_costs(ranks: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], cost: Cost) -> list[float]:
    return [sum(cost(lengths[i]) for micro in rank for i in micro) for rank in ranks]


# --- by hand ----------------------------------------------------------------------------


def test_by_hand():
    batch = pack(of_lengths(4, 10, 6, 2, 8), dp=2, num_updates=1, max_tokens=12)
    # best fit: [10, 2] [8, 4] [6], so two micro-batches on each of two ranks
    # longest first to the cheaper rank: 10 | 8, then 6 to the second (14), 4 to the first (14), 2 to the
    # first (a tie) there into the emptier micro-batch: [10] [4, 2] | [8] [6]
    assert batch.mini_batches[0].micro_batches == (((1,), (0, 3)), ((4,), (2,)))
    assert batch.mini_batches[0].num_tokens == 25
    assert batch.lengths == (4, 10, 6, 2, 8)
    assert batch.imbalance == pytest.approx(16 / 15) and batch.fill == 30 / 48


def test_balance_is_over_all_updates():
    batch = pack(of_lengths(9, 3, 4, 4), dp=2, num_updates=2, max_tokens=10)
    assert batch.imbalance == (9 + 4) / (6 + 4) and batch.fill == 20 / 40


def test_attention_makes_long_samples_dearer():
    samples = of_lengths(8, 4, 4, 2, 2)
    linear = pack(samples, dp=2, num_updates=1, max_tokens=20)
    assert linear.mini_batches[0].micro_batches == (((0, 3),), ((1, 2, 4),)) and linear.imbalance == 1
    quadratic = pack(samples, dp=2, num_updates=1, max_tokens=20, cost=Cost(1, 1))  # 72, 20, 20, 6, 6
    assert quadratic.mini_batches[0].micro_batches == (((0,),), ((1, 2, 3, 4),))
    assert quadratic.imbalance == pytest.approx(72 / 62)


def test_the_second_attempt_fits_tighter():
    lengths, rooms = (7, 6, 3, 2, 2), [[10, 10]]
    # the emptiest: 7 | 6, then 3 to the 6 and 2 to the 7 leave rooms of 1 and 1 for the last 2
    assert share_out(range(5), lengths, lengths, rooms, tight=False) is None
    assert share_out(range(5), lengths, lengths, rooms, tight=True) == [[[0, 2], [1, 3, 4]]]
    assert plan(lengths, dp=1, max_tokens=10, cost=TOKENS) == [[[0, 2], [1, 3, 4]]]


def test_the_last_attempt_deals_the_best_fit():
    lengths = (7, 6, 3, 2, 2)  # 3 goes to the rank with 6, not to the 7 that it would fill
    assert share_out(range(5), lengths, lengths, [[10], [10]], tight=True) is None
    assert plan(lengths, dp=2, max_tokens=10, cost=TOKENS) == [[[0, 2]], [[1, 3, 4]]]


def test_best_fit():
    assert best_fit(range(5), (7, 6, 3, 2, 2), 10) == [[0, 2], [1, 3, 4]]
    assert best_fit(range(4), (5, 5, 5, 1), 9) == [[0, 3], [1], [2]]


def test_dealing_gives_the_cheaper_rank_the_costlier_bin():
    # 9 | 7, then 5 to the second (12) and 1 to the first (10), then 1 to the first and nothing to the second
    assert deal_out([[0], [1], [2], [3], [4]], (7, 1, 9, 5, 1), dp=2, count=3) == [
        [[2], [1], [4]],
        [[0], [3], []],
    ]


def test_an_interleaved_pipeline_gets_a_multiple():
    batch = pack(of_lengths(5, 5, 5), dp=1, num_updates=1, max_tokens=5, multiple=2)
    assert sorted(map(len, batch.mini_batches[0].micro_batches[0])) == [0, 1, 1, 1]
    assert batch.mini_batches[0].micro_batches[0][-1] == ()


def test_a_pipeline_is_kept_filled():
    batch = pack(of_lengths(2, 2, 2, 2), dp=1, num_updates=1, max_tokens=100, min_micro_batches=3)
    assert sorted(map(len, batch.mini_batches[0].micro_batches[0])) == [1, 1, 2]


def test_alignment_takes_room_and_costs():
    samples = of_lengths(5, 3, 3)
    assert pack(samples, dp=1, num_updates=1, max_tokens=11).mini_batches[0].micro_batches == (((0, 1, 2),),)
    padded = pack(samples, dp=1, num_updates=1, max_tokens=11, align=4)  # 8, 4 and 4 in budgets of 8
    assert set(padded.mini_batches[0].micro_batches[0]) == {(0,), (1, 2)} and padded.fill == 11 / 22
    assert pack(samples, dp=2, num_updates=1, max_tokens=11).imbalance == pytest.approx(6 / 5.5)
    assert pack(samples, dp=2, num_updates=1, max_tokens=11, align=4).imbalance == 1


def test_streams_are_end_to_end():
    samples = [
        make_sample([7, 8, 9], 2, advantage=0.5, rollout_logprobs=[0, 0, -1.5]),
        make_sample([4, 5, 6], 1, advantage=[0, -1, 2], rollout_logprobs=[0, -0.5, -2.5]),
    ]
    batch = pack(samples, dp=1, num_updates=1, max_tokens=10)
    assert batch.tokens_T.tolist() == [7, 8, 9, 4, 5, 6] and batch.tokens_T.dtype == torch.int32
    assert batch.response_mask_T.tolist() == [False, False, True, False, True, True]
    assert batch.streams.keys() == {Stream.ROLLOUT_LOGPROBS}
    assert batch.streams[Stream.ROLLOUT_LOGPROBS].tolist() == [0, 0, -1.5, 0, -0.5, -2.5]
    assert batch.advantages_T.tolist() == [0.5, 0.5, 0.5, 0, -1, 2]  # one per token


def test_a_batch_says_which_completion_of_which_prompt_each_sample_is():
    samples = [
        make_sample([7, 8], 1, prompt_position=40, number=3, seed=(1 << 60) + 5, weight_version=2),
        make_sample([7, 8], 1, prompt_position=41, number=0, weight_version=1),
    ]
    batch = pack(samples, dp=1, num_updates=1, max_tokens=10)
    assert batch.prompt_N.tolist() == [40, 41] and batch.number_N.tolist() == [3, 0]
    assert batch.seed_N.tolist() == [(1 << 60) + 5, -1] and batch.version_N.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("trained_version", "fresh"), [(4, [True, False]), (3, [False, True]), (5, [False, False])]
)
def test_fresh_is_what_the_weights_trained_now_have_sampled(trained_version, fresh):
    """At version 5 both were carried over from steps before: the newest of them is not fresh for that."""
    samples = [sample(2, 1, version=4), sample(1, 2, version=3)]
    assert (
        pack(samples, dp=1, num_updates=1, max_tokens=10, version=trained_version).fresh_N.tolist() == fresh
    )


def test_each_mini_batch_has_the_denominator_of_its_own_samples():
    samples = [sample(1, n) for n in (1, 2, 3, 4)]
    batch = pack(
        samples, dp=2, num_updates=2, max_tokens=10, denominator=lambda part: 100 * len(part[0].tokens)
    )
    assert [mini.denominator for mini in batch.mini_batches] == [200, 400]
    assert [mini.num_tokens for mini in batch.mini_batches] == [3, 7]


def test_a_sample_above_the_budget():
    samples = [sample(2, 10), sample(1, 1)]
    with pytest.raises(
        ValueError, match=r"batch\.max_tokens=11 is below the longest sample \(12 tokens\); raise it or lower"
    ):
        pack(samples, dp=1, num_updates=1, max_tokens=11)
    with pytest.raises(
        ValueError, match=r"=13 is below the longest sample \(16 tokens, padded to a multiple of 8\); raise"
    ):
        pack(samples, dp=1, num_updates=1, max_tokens=13, align=8)


def test_fewer_samples_than_updates():
    with pytest.raises(ValueError, match="3 updates need at least as many samples, got 2"):
        pack([sample(2, 1)] * 2, dp=1, num_updates=3, max_tokens=11)


# --- the model's cost -------------------------------------------------------------------


def test_cost_of_qwen_32b_by_hand():
    attention = 5120 * 5120 + 2 * 5120 * 1024 + 5120 * 5120  # q, k and v of 8 heads, output
    weights = 64 * (attention + 3 * 5120 * 27648) + 5120 * 152064
    assert (
        pytest.approx(weights, rel=1e-3) == 32.76e9 - 152064 * 5120
    )  # the published size, less the input embedding
    assert Cost(2 * weights, 2 * 64 * 5120) == QWEN32B


def test_cost_of_a_model_equals_the_flops_that_torch_counts():
    """transformers multiplies all pairs of tokens, masked or not: twice our quadratic part."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "num_layers": 3,
        "hidden_size": 96,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 32,
        "ffn_size": 160,
    }
    config = Qwen2Config(
        num_hidden_layers=3,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=160,
        vocab_size=500,
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config)
    cost = Cost.of_model(**sizes, vocab_size=500)
    for length in (16, 200):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, length, dtype=torch.long))
        assert Cost(cost.per_token, 2 * cost.per_pair)(length) == counter.get_total_flops()


@pytest.mark.parametrize("values", [(0, 1), (1, -1)])
def test_a_cost_that_does_not_grow(values):
    with pytest.raises(ValueError, match="must grow with the length; give per_token > 0"):
        Cost(*values)


# --- 8,192 samples, 128 ranks -----------------------------------------------------------

RANKS, BUDGET = 128, 22528


def clipped(length: float) -> int:
    return max(16, min(20480, int(length)))


def draw(name: str, num: int = 8192) -> list[int]:
    random_ = random.Random(0)
    return {
        "lognormal": lambda: [clipped(random_.lognormvariate(math.log(3000), 1)) for _ in range(num)],
        "uniform": lambda: [
            random_.randint(16, 20480) for _ in range(num)
        ],  # 99.7 % of the budgets: only best fit is as tight
        "shorter uniform": lambda: [
            random_.randint(16, 18000) for _ in range(num)
        ],  # 98 %: the second attempt
        "equal": lambda: [BUDGET // 4] * num,
        "bimodal": lambda: [
            clipped(random_.gauss(*random_.choices([(1500, 300), (14000, 2000)], [8, 2])[0]))
            for _ in range(num)
        ],
        "heavy tail": lambda: [clipped(300 * random_.paretovariate(0.8)) for _ in range(num)],
    }[name]()


def lower_bound(lengths: Sequence[int]) -> int:
    return math.ceil(sum(lengths) / (BUDGET * RANKS))


@pytest.mark.parametrize(
    "name", ["lognormal", "uniform", "shorter uniform", "equal", "bimodal", "heavy tail"]
)
def test_ranks_of_a_large_run_are_balanced(name):
    lengths = draw(name)
    began = time.process_time()
    ranks = plan(lengths, dp=RANKS, max_tokens=BUDGET, cost=QWEN32B)
    assert time.process_time() - began < 1
    assert sorted(i for rank in ranks for micro in rank for i in micro) == list(range(8192))
    assert all(sum(lengths[i] for i in micro) <= BUDGET for rank in ranks for micro in rank)
    assert {len(rank) for rank in ranks} == {lower_bound(lengths)}
    costs = rank_costs(ranks, lengths, QWEN32B)
    assert max(costs) <= 1.01 * fmean(costs)


def test_lengths_that_cannot_fill_a_budget_take_no_more_than_they_must():
    ranks = plan([4096] * 8192, dp=RANKS, max_tokens=BUDGET, cost=QWEN32B)  # five to a budget, 64 to a rank
    assert {len(rank) for rank in ranks} == {13} and lower_bound([4096] * 8192) == 12
    assert {sum(len(micro) for micro in rank) for rank in ranks} == {64}


def first_fit(indices: Sequence[int], lengths: Sequence[int]) -> int:
    """Micro-batches that one rank needs when every sample goes into the first with room."""
    rooms: list[int] = []
    for i in indices:
        first = next((b for b, room in enumerate(rooms) if room >= lengths[i]), None)
        if first is None:
            rooms.append(BUDGET)
            first = -1
        rooms[first] -= lengths[i]
    return len(rooms)


def test_samples_as_they_come_would_be_half_as_good():
    """The baseline: sample i to rank i modulo 128, micro-batches first fit."""
    lengths = draw("lognormal")
    ranks = [range(d, 8192, RANKS) for d in range(RANKS)]
    costs = rank_costs([[rank] for rank in ranks], lengths, QWEN32B)
    assert max(costs) > 1.4 * fmean(costs)
    assert max(first_fit(rank, lengths) for rank in ranks) >= 1.4 * lower_bound(lengths)


def test_ranks_before_micro_batches_would_need_more_of_them():
    """The baseline: longest first to the least loaded rank, then first fit inside it, whatever budgets."""
    lengths = draw("uniform")
    ranks: list[list[int]] = [[] for _ in range(RANKS)]
    loads = [0] * RANKS
    for i in sorted(range(8192), key=lambda i: -lengths[i]):
        d = loads.index(min(loads))
        ranks[d].append(i)
        loads[d] += lengths[i]
    assert max(first_fit(rank, lengths) for rank in ranks) > lower_bound(lengths)
