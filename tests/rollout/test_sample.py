"""Seeds: repeatable, and never shared."""

from __future__ import annotations

import random

from support.samples import make_completion, make_group, make_prompt

from megatron_dapo.rollout.sample import EvaluationSampling, GroupSampler, evaluation_seed, training_seed


def test_training_seeds_are_those_of_earlier_releases():
    """Computed by hand: a run that is resumed samples what it would have sampled."""
    assert training_seed(0, 0, 5) == 5 * 4096
    assert training_seed(0, 7, 5) == (7 * 1_000_003 + 5) * 4096
    assert training_seed(3, 2, 1) == ((3 * 1_000_003 + 2) * 1_000_003 + 1) * 4096
    assert training_seed(282, 0, 0) == (282 * 1_000_003**2 - (1 << 48)) * 4096  # wraps at 2^48


def test_evaluation_never_shares_a_seed_with_training():
    largest = training_seed(0, 0, (1 << 48) - 1) + 4095
    assert largest < evaluation_seed(0, 0, 0) == (1 << 60) + 2048
    assert evaluation_seed(1, 2, 3) - training_seed(1, 2, 3) == (1 << 60) + 2048
    assert evaluation_seed(0, 0, (1 << 48) - 1) + 4095 < 1 << 63  # a signed 64-bit integer, as vLLM keeps it


def test_nor_the_lower_32_bits_of_one():
    """torch's CPU generator takes no more of a seed (tests/rollout/test_client.py shows it)."""
    chance = random.Random(0)
    drawn = [(chance.randrange(100), chance.randrange(1000), chance.randrange(10**6)) for _ in range(1000)]
    low = {training_seed(*values) % (1 << 32) % 4096 for values in drawn}
    assert low == {0}
    assert {evaluation_seed(*values) % (1 << 32) % 4096 for values in drawn} == {2048}


async def sampled(seeded: bool) -> list[dict]:
    calls = []

    async def generate(prompt_tokens, *, seed_of, **options):
        calls.append({"tokens": prompt_tokens, "seed": seed_of(2), **options})
        return [make_completion()]

    async def grade(prompt, completions):
        return make_group(prompt)

    sampler = GroupSampler(
        generate=generate,
        grade=grade,
        run_seed=3,
        seeded=seeded,
        options={"max_tokens": 9, "stop_token_ids": (1,)},
    )
    prompt = make_prompt(4)
    group = await sampler.to_train(prompt, n=16, temperature=0.7)
    assert group.prompt is prompt
    await sampler.to_evaluate(prompt, EvaluationSampling(n=2, temperature=0.0, top_p=0.5))
    return calls


async def test_a_group_is_asked_for_by_what_it_is_sampled_for():
    fixed = {"tokens": (1, 2), "max_tokens": 9, "stop_token_ids": (1,)}
    training, evaluation = await sampled(True)
    assert training == fixed | {"seed": training_seed(3, 2, 4), "n": 16, "temperature": 0.7, "top_p": 1.0}
    assert evaluation == fixed | {"seed": evaluation_seed(3, 2, 4), "n": 2, "temperature": 0.0, "top_p": 0.5}


async def test_without_seeds_no_request_has_one():
    assert [call["seed"] for call in await sampled(False)] == [None, None]
