"""Every kind with every aggregation: loss and gradient are those of the paper's formula in float64, however
the tokens are split over micro-batches and ranks, and whatever else the section adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.objective_reference import (
    AGGREGATIONS,
    GROUP_KINDS,
    Response,
    expected,
    make_inputs,
    make_responses,
)
from support.samples import make_sample
from support.split_ranks import on_threads

from megatron_dapo.config.objective import KINDS
from megatron_dapo.metrics import Columns, flatten, merge
from megatron_dapo.objectives import make_objective
from megatron_dapo.objectives.base import LossTerms, Objective
from megatron_dapo.types import Sample, Stream

CONSTANT = 9
# bounds that these responses reach
REACHED: dict[str, dict[str, Any]] = {"cispo": {"eps_low": 0.25, "eps_high": 0.2}}


def section(kind: str, **options: Any) -> Any:
    return KINDS[kind](**({"constant_length": CONSTANT} | REACHED.get(kind, {}) | options))  # type: ignore[arg-type]


def samples_of(responses: list[Response]) -> list[Sample]:
    """As many tokens, for the denominator; and one that is masked whole."""
    lengths = [len(response.now) for response in responses]
    masked = make_sample([1, 2, 3], 1, response_mask=[False] * 3)
    return [make_sample(range(n + 2), 2) for n in lengths] + [masked]


Gradients = dict[tuple[int, int], float]


def measure(
    objective: Objective,
    responses: list[Response],
    here: Callable[..., bool] = lambda i, t: True,
    group: Any = None,
) -> tuple[LossTerms, Gradients, list[float]]:
    """Terms of the tokens `here`, and the gradient of the sum by log-probability and by entropy."""
    inputs, where = make_inputs(responses, here, group)
    terms = objective.loss(inputs)
    terms.loss.backward()
    entropy = inputs.entropy_R.grad
    by_entropy = entropy.tolist() if entropy is not None else [0.0] * len(where)
    return terms, dict(zip(where, inputs.logprobs_R.grad.tolist(), strict=True)), by_entropy


def check(config: Any, responses: list[Response], rel: float = 1e-9) -> None:
    objective = make_objective(config)
    terms, gradients, by_entropy = measure(objective, responses)
    divisor = objective.denominator(samples_of(responses)) - int(terms.excluded)
    loss, wanted, wanted_entropy = expected(config, responses)
    assert float(terms.loss.detach()) / divisor == pytest.approx(loss, rel=rel)
    found = {token: value / divisor for token, value in gradients.items()}
    assert found == pytest.approx(wanted, rel=rel, abs=1e-12)
    assert [x / divisor for x in by_entropy] == pytest.approx(wanted_entropy, rel=rel, abs=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_loss_and_gradient_are_the_papers(kind, aggregation):
    for seed in range(3):
        check(section(kind, aggregation=aggregation), make_responses(seed))
        # a response's mean ratio near 1, inside and outside GSPO's bounds
        check(section(kind, aggregation=aggregation), make_responses(seed, wide=1e-3))


OPTIONS = {
    "kl_k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "kl_k3": {"kl_coef": 0.3, "kl_estimator": "k3"},
    "entropy": {"entropy_coef": 0.2},
    "lm": {"lambda_lm": 0.4},
    "kl_cov": {"covariance": "kl", "covariance_kl_coef": 0.7},
}


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["dapo", "gspo", "cispo"])
def test_what_the_section_adds_is_added(kind, option, aggregation):
    config = section(kind, aggregation=aggregation, **OPTIONS[option])
    check(config, make_responses(4))
    plain = expected(section(kind, aggregation=aggregation), make_responses(4))
    assert abs(plain[0] - expected(config, make_responses(4))[0]) > 1e-3


@pytest.mark.parametrize("kind", ["dppo", "dapo", "gspo", "cispo"])
def test_the_clips_are_reached(kind):
    """Else the tests above would pass without them."""
    terms, *_ = measure(make_objective(section(kind)), make_responses(7))
    shares = {name: flatten(terms.metrics)[name] for name in terms.metrics if name[:4] in ("clip", "outs")}
    assert 0 < sum(shares.values()) < len(shares)


def test_the_other_divergence_of_dppo():
    for seed in range(5):
        check(section("dppo", divergence="kl", delta=0.01), make_responses(seed), rel=1e-6)


def test_a_ratio_that_dppo_cuts_keeps_its_gradient():
    for seed in range(3):
        check(section("dppo", ratio_max=1.05), make_responses(seed))


def test_clip_cov_takes_the_gradient_of_the_tokens_away_and_nothing_else():
    responses = make_responses(5)
    terms, gradients, _ = measure(make_objective(section("dapo", covariance="clip")), responses)
    plain, plain_gradients, _ = measure(make_objective(section("dapo")), responses)
    held = {(i, t) for i, r in enumerate(responses) for t, is_held in enumerate(r.held_back) if is_held}
    assert any(plain_gradients[token] for token in held) and terms.loss == plain.loss
    assert gradients == {token: 0.0 if token in held else g for token, g in plain_gradients.items()}
    assert float(terms.metrics["high_covariance"].total) == len(held)


# --- however it is split -----------------------------------------------------------------

CORRECTIONS = {
    "none": {},
    "mask": {"mismatch_correction": "mask", "mismatch_low": 0.8, "mismatch_high": 1.2},
    "geometric": {
        "mismatch_correction": "mask",
        "mismatch_level": "geometric",
        "mismatch_low": 0.85,
        "mismatch_high": 1.13,
    },
    "truncate": {
        "mismatch_correction": "truncate",
        "mismatch_level": "sequence",
        "mismatch_high": 1.05,
    },
}


def assert_adds_up(
    config: Any, responses: list[Response], parts: list[tuple[LossTerms, Gradients, list]]
) -> None:
    whole, gradients, _ = measure(make_objective(config), responses)
    assert sum(float(part[0].loss.detach()) for part in parts) == pytest.approx(float(whole.loss.detach()))
    assert {t: g for part in parts for t, g in part[1].items()} == pytest.approx(gradients)
    for count in ("num_tokens", "excluded"):
        assert sum(int(getattr(part[0], count)) for part in parts) == int(getattr(whole, count))
    merged = flatten(merge(part[0].metrics for part in parts))
    assert merged == pytest.approx(flatten(whole.metrics), nan_ok=True)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_micro_batches_and_split_samples_add_up_to_the_whole(monkeypatch, kind, aggregation, correction):
    responses = make_responses(8)
    config = section(kind, aggregation=aggregation, entropy_coef=0.1, **CORRECTIONS[correction])
    objective = make_objective(config)
    micro = [
        measure(objective, responses, lambda i, t, own=own: i in own) for own in ((0, 3), (1,), (), (2, 4))
    ]
    assert_adds_up(config, responses, micro)
    ranks = on_threads(
        monkeypatch, 2, lambda rank, group: measure(objective, responses, lambda i, t: t % 2 == rank, group)
    )
    assert_adds_up(config, responses, ranks)


# --- with a mismatch correction ----------------------------------------------------------


@pytest.mark.parametrize("correction", ["mask", "geometric", "truncate"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_a_mismatch_correction_composes_with_every_kind(kind, aggregation, correction):
    """The gradient is that of the tokens that stay, as if there were no others, each times its weight."""
    options = CORRECTIONS[correction]
    responses = make_responses(8)
    config = section(kind, aggregation=aggregation, kl_coef=0.0, **options)
    objective = make_objective(config)
    terms, gradients, _ = measure(objective, responses)
    weights = {(i, t): w for i, r in enumerate(responses) for t, w in enumerate(weights_of(r, options))}
    if options["mismatch_correction"] == "truncate":
        factors = {token: min(w, options["mismatch_high"]) for token, w in weights.items()}
    else:
        low, high = options["mismatch_low"], options["mismatch_high"]
        factors = {token: w for token, w in weights.items() if low <= w <= high}
    left = [stays(r, [t for t in range(len(r.now)) if (i, t) in factors]) for i, r in enumerate(responses)]
    _, wanted, _ = expected(section(kind, aggregation=aggregation, kl_coef=0.0), [r for r in left if r.now])
    places = [(i, t) for i, r in enumerate(responses) for t in range(len(r.now)) if (i, t) in factors]
    wanted = {place: factors[place] * g for place, g in zip(places, wanted.values(), strict=True)}
    divisor = objective.denominator(samples_of(responses)) - int(terms.excluded)
    assert {token: g / divisor for token, g in gradients.items() if token in factors} == pytest.approx(
        wanted, rel=1e-6, abs=1e-9
    )
    assert all(g == 0 for token, g in gradients.items() if token not in factors)
    assert correction == "truncate" or 0 < len(factors) < len(weights)


def weights_of(response: Response, options: dict[str, Any]) -> list[float]:
    logs = [old - rollout for old, rollout in zip(response.old, response.rollout, strict=True)]
    level = options.get("mismatch_level", "token")
    if level == "token":
        return [math.exp(x) for x in logs]
    return [math.exp(sum(logs) / (len(logs) if level == "geometric" else 1))] * len(logs)


def stays(response: Response, tokens: list[int]) -> Response:
    columns = ("now", "old", "rollout", "reference", "entropy", "held_back")
    kept = {name: [getattr(response, name)[t] for t in tokens] for name in columns}
    return Response(**kept, advantage=response.advantage, correct=response.correct)


# --- extremes ----------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("gap", [95.0, -95.0, 1e4])
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_a_log_ratio_beyond_20_has_a_finite_loss_and_gradient(kind, gap, advantage):
    """exp(95) is infinite in fp32, and 0 times infinity is no number."""
    options = {
        "kl_coef": 0.1,
        "kl_estimator": "k3",
        "entropy_coef": 0.1,
        "lambda_lm": 0.1,
        "covariance": "kl",
    }
    inputs, _ = make_inputs(make_responses())
    count = len(inputs.logprobs_R)
    now = torch.full((count,), -1.0).requires_grad_()
    streams = {name: stream.float() for name, stream in inputs.streams.items()}
    streams[Stream.OLD_LOGPROBS] = torch.full((count,), -1.0 - gap)
    streams[Stream.REFERENCE_LOGPROBS] = torch.full((count,), -1.0 + gap)
    terms = make_objective(section(kind, **options)).loss(
        type(inputs)(
            logprobs_R=now,
            entropy_R=inputs.entropy_R.detach().float(),
            advantages_R=torch.full((count,), advantage),
            fresh_R=inputs.fresh_R,
            samples_R=inputs.samples_R,
            num_samples=inputs.num_samples,
            streams=streams,
        )
    )
    terms.loss.backward()
    assert terms.loss.isfinite() and now.grad.isfinite().all()
    assert all(math.isfinite(value) for name, value in flatten(terms.metrics).items() if name != "gap_max")


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_an_empty_micro_batch_reports_the_same_metrics(kind):
    objective = make_objective(section(kind, lambda_lm=0.1, covariance="clip", entropy_coef=0.1))
    full, *_ = measure(objective, make_responses())
    empty, *_ = measure(objective, make_responses(), lambda i, t: False)
    assert Columns.of(empty.metrics) == Columns.of(full.metrics) and float(empty.loss.detach()) == 0


def test_a_response_that_is_masked_whole_leaves_the_denominator():
    """Of the five responses the second (one token) and no other has w outside [0.5, 2]."""
    responses = make_responses()
    low = Response(
        **{**{f: getattr(responses[1], f) for f in Response.__dataclass_fields__}, "rollout": [0.9]}
    )
    for aggregation, excluded in zip(AGGREGATIONS, (1, 1, 1, CONSTANT), strict=True):
        config = section("dapo", aggregation=aggregation, mismatch_correction="mask", mismatch_low=0.3)
        terms, *_ = measure(make_objective(config), [responses[0], low, *responses[2:]])
        assert int(terms.excluded) == excluded and int(terms.num_tokens) == 18
