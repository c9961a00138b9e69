"""One batch, every layout, every split: the same loss, gradients and weights, and those are the paper's."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from support import reference
from support.cases import plan
from support.invariance import RELATIVE, Case, World, check

from megatron_dapo.layout import Layout

RECOMPUTE_ALL = ("recompute=full",)
RECOMPUTE_SOME = ("recompute=selective", "recompute_modules=[core_attn,mlp,layernorm]")
OVERLAP = ("overlap_grad_reduce=true", "overlap_param_gather=true")
ON_2 = [
    Case(),
    Case(tied=True),
    Case(num_updates=1),
    Case(budget="one"),
    Case(budget="all", distributed=False),
    Case(layout="tp2"),
    Case(layout="tp2", tied=True, distributed=False),
    Case(layout="tp2_sp"),
    Case(layout="tp2_sp", tied=True, budget="one"),
    Case(layout="pp2"),
    Case(layout="pp2", tied=True),
    Case(layout="pp2", budget="one"),
    Case(layout="pp2", budget="all", num_updates=1),
    Case(layout="dp2"),
    Case(layout="dp2", tied=True),
    Case(layout="dp2", budget="one", num_updates=1),
    Case(layout="dp2", budget="all", distributed=False),
    Case(num_updates=4),
    Case(layout="cp2"),
    Case(layout="cp2", tied=True, budget="one"),
    Case(layout="pp2_vpp2", budget="one"),
    Case(layout="pp2_vpp2", tied=True),
    Case(policy=RECOMPUTE_ALL),
    Case(layout="tp2_sp", policy=RECOMPUTE_SOME),
    Case(layout="dp2", policy=OVERLAP),
]
BF16 = [Case(layout=layout, dtype="bf16") for layout in ("tp1", "tp2_sp", "pp2_vpp2", "cp2", "dp2")]
OFFLOAD = [
    Case(layout="dp2", dtype="bf16", offload=1.0),
    Case(layout="dp2", dtype="bf16", offload=0.5, policy=OVERLAP),
]
ON_4 = [
    Case(layout="tp2_sp_pp2"),
    Case(layout="tp2_cp2"),
    Case(layout="tp2_sp_cp2", tied=True, budget="one", num_updates=4),
    Case(layout="dp2_cp2", policy=OVERLAP),
    Case(layout="tp2_sp_pp2_vpp2", policy=(*RECOMPUTE_ALL, *OVERLAP)),
]
ON_8 = [
    Case(layout="tp2_pp2_dp2"),
    Case(layout="tp2_pp2_dp2", tied=True, budget="one"),
    Case(layout="tp2_pp2_dp2", tied=True, num_updates=1, distributed=False),
    Case(layout="pp2_vpp2_cp2_dp2", tied=True, policy=OVERLAP),
]
EXTRA = [  # everything else on two ranks
    Case(layout=layout, tied=tied, num_updates=updates, budget=budget, distributed=distributed)
    for layout in ("tp1", "tp2", "tp2_sp", "pp2", "pp2_vpp2", "cp2", "dp2")
    for tied in (False, True)
    for updates in (1, 2, 4)
    for budget in ("one", "half", "all")
    for distributed in (True, False)
]
EXTRA = [case for case in EXTRA if case not in ON_2]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def expected(world):
    """The reference's updates, computed once for each model and split into updates."""
    return functools.cache(world.expected)


@pytest.fixture(scope="module")
def on_2(world):
    return world.measure(2, ON_2)


@pytest.fixture(scope="module")
def on_2_in_bf16(world):
    return world.measure(2, BF16 + [Case(layout="dp2", dtype="bf16", policy=OVERLAP), *OFFLOAD])


@pytest.fixture(scope="module")
def on_4(world):
    return world.measure(4, ON_4)


@pytest.fixture(scope="module")
def on_8(world):
    return world.measure(8, ON_8)


@pytest.fixture(scope="module")
def extra(world):
    """Results of a layout's cases, from one launch of ranks each: a hundred policies one after another wear a
    process out.
    """
    return functools.cache(lambda layout: world.measure(2, [case for case in EXTRA if case.layout == layout]))


@pytest.mark.parametrize("case", ON_2, ids=lambda case: case.name)
def test_two_ranks_equal_the_reference(world, expected, on_2, case):
    check(world, expected(case.tied, case.num_updates), on_2, case)


@pytest.mark.parametrize("case", ON_4, ids=lambda case: case.name)
def test_four_ranks_equal_the_reference(world, expected, on_4, case):
    check(world, expected(case.tied, case.num_updates), on_4, case)


@pytest.mark.parametrize("case", BF16, ids=lambda case: case.name)
def test_bf16_stays_close_to_the_reference(world, on_2_in_bf16, case):
    """The first update only: the next one starts from weights whose smallest gradients' signs bf16 has
    changed.
    """
    loss, grad_norm = world.expected(False, 2, torch.bfloat16).results[0]
    first = next(ranks[case.name] for ranks in on_2_in_bf16 if case.name in ranks)[0]
    assert first["loss"] == pytest.approx(loss, rel=2e-2)
    assert first["grad_norm"] == pytest.approx(grad_norm, rel=2e-2)


@pytest.mark.parametrize("case", OFFLOAD, ids=lambda case: case.name)
def test_an_offloaded_optimizer_changes_no_bit(world, on_2_in_bf16, case):
    name, plain = case.name, replace(case, offload=0.0).name
    for ranks in on_2_in_bf16:
        assert ranks[name] == ranks[plain]
        # The fp32 weights too: rounded to bf16 they hide most differences of a last bit.
        assert ranks[f"{name}-state"] == ranks[f"{plain}-state"]
    found, expected = world.exported(name), world.exported(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("case", ON_8, ids=lambda case: case.name)
def test_eight_ranks_equal_the_reference(world, expected, on_8, case):
    check(world, expected(case.tied, case.num_updates), on_8, case)


def test_clips_and_entropy_equal_the_reference(world, on_2):
    tokens = low = high = kl = entropy = 0.0
    model = reference.load(world.models[False])
    for sample, old in zip(world.samples[:6], world.old[False], strict=False):
        advantage = reference.advantage_of(sample)
        with torch.no_grad():
            probabilities = model(sample.tokens.long()[None]).logits[0, :-1].softmax(-1)
        for t in range(1, len(sample.tokens)):
            if sample.response_mask[t]:
                p = probabilities[t - 1]
                log_ratio = float(p[sample.tokens[t]].log() - old[t])
                ratio = math.exp(log_ratio)
                tokens += 1
                low += advantage < 0 and ratio < 0.8
                high += advantage > 0 and ratio > 1.28
                kl += ratio - 1 - log_ratio
                entropy -= float((p * p.log()).sum())
    assert low > 0 and high > 0
    for name in ("tp1-untied-2up-half", "tp2-untied-2up-half", "dp2-untied-2up-half"):
        found = on_2[0][name][0]
        assert found["clip_low"] == pytest.approx(low / tokens, abs=1e-9)
        assert found["clip_high"] == pytest.approx(high / tokens, abs=1e-9)
        assert found["kl_old"] == pytest.approx(kl / tokens, rel=1e-4)
        assert found["entropy"] == pytest.approx(entropy / tokens, rel=1e-5)


# --- would the bugs that others shipped be seen on this batch? --------------------------


def weighted(world: World, weights: list[float]) -> tuple[float, float]:
    """Loss and gradient norm where every trained token of sample i counts `weights[i]`."""
    model = reference.load(world.models[False])
    losses = reference.sample_losses(model, world.samples, world.old[False])
    loss = torch.stack([w * part.sum() for w, part in zip(weights, losses, strict=True)]).sum()
    loss.backward()
    return float(loss.detach()), math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))


def wrong_weights(world: World, mistake: str) -> list[float]:
    counts = [int(s.response_mask.sum()) for s in world.samples]
    (ranks,) = (
        mini.micro_batches
        for mini in plan(world.samples, Layout(dp=2), num_updates=1, budget="one").mini_batches
    )
    weights = [0.0] * len(counts)
    if mistake == "none":
        return [1 / sum(counts)] * len(counts)
    if mistake == "mean of micro-batch means":
        for rank in ranks:
            for micro in rank:
                for i in micro:
                    weights[i] = 1 / max(sum(counts[j] for j in micro), 1) / len(rank) / len(ranks)
    elif mistake == "sum of micro-batch means":
        for rank in ranks:
            for micro in rank:
                for i in micro:
                    weights[i] = 1 / max(sum(counts[j] for j in micro), 1) / len(ranks)
    elif mistake == "at least one token counted per sample":
        weights = [1 / sum(max(count, 1) for count in counts)] * len(counts)
    elif mistake == "every rank divides by its own tokens":
        for rank in ranks:
            for i in (own := [i for micro in rank for i in micro]):
                weights[i] = 1 / sum(counts[j] for j in own) / len(ranks)
    return weights


def test_the_weights_of_the_mistakes_start_from_the_right_ones(world, on_2):
    found = on_2[0]["dp2-untied-1up-one"][0]
    assert weighted(world, wrong_weights(world, "none")) == pytest.approx(
        (found["loss"], found["grad_norm"]), rel=RELATIVE
    )


@pytest.mark.parametrize(
    "mistake",
    [
        "mean of micro-batch means",
        "sum of micro-batch means",
        "at least one token counted per sample",
        "every rank divides by its own tokens",
    ],
)
def test_a_wrong_denominator_would_be_seen(world, on_2, mistake):
    found = on_2[0]["dp2-untied-1up-one"][0]
    loss, grad_norm = weighted(world, wrong_weights(world, mistake))
    assert abs(loss / found["loss"] - 1) > 1e-3
    assert abs(grad_norm / found["grad_norm"] - 1) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", EXTRA, ids=lambda case: case.name)
def test_every_combination_on_two_ranks_equals_the_reference(world, expected, extra, case):
    check(world, expected(case.tied, case.num_updates), extra(case.layout), case)
