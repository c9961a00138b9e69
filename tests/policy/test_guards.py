"""NaN and infinity on a real policy: named with their rank, and the weights are those before the update."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from support.jobs_guards import BAD_SAMPLE, BAD_TOKEN, NAME, Poison, PoisonedRun
from support.models import make_tiny_model
from support.ranks import run_ranks

from megatron_dapo.config import OptimizerConfig
from megatron_dapo.errors import UserError
from megatron_dapo.metrics import Count, Max, Mean, flatten
from megatron_dapo.policy.guards import LEAST, Guard, NotFinite
from megatron_dapo.policy.step import combine
from megatron_dapo.types import UpdateResult

GOOD = Poison()
BAD_GRADIENT = Poison(gradient=math.nan, rank=1)
SKIP = ("optimizer.on_nonfinite=skip_update", "optimizer.max_skipped=2")
RUNS = {
    f"gradient-{layout}{'' if distributed else '-whole'}": PoisonedRun(
        layout=layout,
        overrides=[f"optimizer.distributed={distributed}"],
        updates=[BAD_GRADIENT, GOOD],
    )
    for layout, distributed in (("dp2", True), ("dp2", False), ("tp2", True), ("pp2", True))
}
RUNS |= {
    "infinite gradient": PoisonedRun(layout="tp1", updates=[Poison(gradient=math.inf)]),
    "unclipped": PoisonedRun(layout="dp2", overrides=["optimizer.clip_grad=0"], updates=[BAD_GRADIENT, GOOD]),
    "replicated": PoisonedRun(
        layout="tp2",
        updates=[Poison(gradient=math.nan, rank=1, names=["decoder.final_layernorm.weight"])],
    ),
    "advantage-dp2": PoisonedRun(layout="dp2", updates=[Poison(advantage=math.nan)]),
    "advantage-tp2": PoisonedRun(layout="tp2", updates=[Poison(advantage=math.nan)]),
    "parameter": PoisonedRun(layout="dp2", updates=[Poison(parameter=math.nan, rank=1)]),
    "huge parameter": PoisonedRun(layout="tp1", updates=[Poison(parameter=1e30)]),
    "after": PoisonedRun(layout="dp2", updates=[Poison(after=math.inf, rank=1)]),
    "skip": PoisonedRun(
        layout="dp2",
        overrides=SKIP,
        updates=[GOOD, BAD_GRADIENT, Poison(advantage=math.inf), GOOD, BAD_GRADIENT],
    ),
    "limit": PoisonedRun(layout="dp2", overrides=SKIP, updates=[BAD_GRADIENT] * 3),
    "empty-dp2": PoisonedRun(layout="dp2", updates=[GOOD, Poison(empty=True), GOOD]),
    "empty-pp2": PoisonedRun(layout="pp2", updates=[Poison(empty=True), GOOD]),
    "never bad": PoisonedRun(layout="dp2", overrides=SKIP, updates=[GOOD, GOOD]),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guards")
    model = str(
        make_tiny_model(folder / "model", tied=True, layers=2, heads=4, kv_heads=2, hidden=64, ffn=64)
    )
    return run_ranks("support.jobs_guards:run_poisoned", 2, model=model, folder=str(folder), runs=RUNS)


def on_each_rank(reports: list[dict[str, Any]], name: str) -> list[list[dict[str, Any]]]:
    return [rank[name] for rank in reports if name in rank]


@pytest.mark.parametrize(
    "name", [name for name in RUNS if name.startswith("gradient") or name == "unclipped"]
)
def test_a_bad_gradient_stops_every_rank_and_names_tensor_and_rank(reports, name):
    for bad, good in on_each_rank(reports, name):
        assert f"rank 1: gradient of {NAME}" in bad["raised"] and "rank 0" not in bad["raised"]
        assert ("and 1 more" in bad["raised"]) == (
            "pp2" not in name
        )  # the last of the two, where backward begins
        assert (
            "update 1: the gradient is not finite (norm nan; rank" in bad["raised"]
            and "the weights were not changed" in bad["raised"]
        )
        assert bad["untouched"] and bad["same_rate"] and bad["num_updates"] == 0
        assert not good["untouched"] and math.isfinite(good["grad_norm"]) and good["num_updates"] == 1


def test_an_infinite_gradient_is_seen_too(reports):
    ((bad,),) = on_each_rank(reports, "infinite gradient")
    assert f"rank 0: gradient of {NAME}" in bad["raised"] and bad["untouched"]


def test_a_bad_gradient_that_the_norm_does_not_count_is_seen(reports):
    """Megatron's norm takes a replicated tensor from the first tensor-parallel rank alone."""
    for (bad,) in on_each_rank(reports, "replicated"):
        assert (
            "(norm nan" not in bad["raised"]
            and "rank 1: gradient of decoder.final_layernorm.weight)" in bad["raised"]
        )
        assert bad["untouched"]


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_a_bad_loss_names_the_sample_and_the_micro_batch_on_every_rank(reports, layout):
    """With dp2 only one rank has the sample, with tp2 both have it and one speaks for them."""
    ranks = on_each_rank(reports, f"advantage-{layout}")
    assert len(ranks) == 2
    clause = f"advantages of sample {BAD_SAMPLE} of the prompt at position 0, token {BAD_TOKEN}, is nan"
    for (bad,) in ranks:
        assert bad["raised"].count(clause) == 1
        assert re.search(rf"the loss is nan \(rank [01]: {clause}; rank [01]: loss of", bad["raised"])
        assert "loss of micro-batch" in bad["raised"] and bad["untouched"]


def test_a_bad_parameter_names_itself(reports):
    for (bad,) in on_each_rank(reports, "parameter"):
        assert f"the loss is nan (rank 1: parameter {NAME})" in bad["raised"] and bad["untouched"]


def test_a_norm_that_overflows_is_no_bad_parameter(reports):
    ((good,),) = on_each_rank(reports, "huge parameter")
    assert not good["raised"] and not good["untouched"]


def test_weights_spoilt_by_the_update_stop_whatever_is_configured(reports):
    for (bad,) in on_each_rank(reports, "after"):
        assert f"after update 1 the weights are not finite (rank 1: parameter {NAME})" in bad["raised"]
        assert "resume from the last checkpoint" in bad["raised"]


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_an_update_without_a_trained_token_did_not_happen(reports, layout):
    """AdamW would move the weights by their decay, and by its moments where there are some."""
    for rank in on_each_rank(reports, f"empty-{layout}"):
        (empty,) = [update for update in rank if update["says_skipped"]]
        k = rank.index(empty)
        assert empty["untouched"] and empty["same_rate"] and (empty["tokens"], empty["skipped"]) == (0, 1)
        assert empty["num_updates"] == k and rank[k + 1]["num_updates"] == k + 1
        (warning,) = empty["warnings"]
        assert warning.startswith(f"update {k + 1}: no token is in the loss (no response is trained on)")
        assert not rank[k + 1]["untouched"] and not empty["raised"]


def test_a_skipped_update_did_not_happen(reports):
    for rank in range(2):
        first, second, third, fourth, last = reports[rank]["skip"]
        assert [u["skipped"] for u in reports[rank]["skip"]] == [0, 1, 1, 0, 1]
        assert [u["says_skipped"] for u in reports[rank]["skip"]] == [False, True, True, False, True]
        assert (
            second["untouched"]
            and second["same_rate"]
            and second["num_updates"] == 1
            and second["tokens"] == 0
        )
        assert (
            third["untouched"]
            and "the loss is" in third["warnings"][0]
            and "(2 in a row)" in third["warnings"][0]
        )
        assert not fourth["untouched"] and not fourth["same_rate"] and fourth["num_updates"] == 2
        assert "(1 in a row)" in last["warnings"][0]  # a good update in between starts the count anew
        assert f"rank 1: gradient of {NAME}" in second["warnings"][0]
        # and the update after the skipped ones is the one that would have come without them
        same = reports[rank]["never bad"]
        assert [first["grad_norm"], fourth["grad_norm"]] == [u["grad_norm"] for u in same]


def test_the_limit_of_skipped_updates_stops(reports):
    for rank in range(2):
        *skipped, last = reports[rank]["limit"]
        assert [u["skipped"] for u in skipped] == [1, 1] and not any(u["raised"] for u in skipped)
        assert (
            "optimizer.max_skipped=2 updates were skipped just before" in last["raised"] and last["untouched"]
        )


# --- without ranks ----------------------------------------------------------------------


def spikes(norms: list[float], **options: Any) -> list[str]:
    """The warnings of updates with these norms, one after the other."""
    guard = Guard(OptimizerConfig(**options), None)  # type: ignore[arg-type]
    warnings = []
    for update, norm in enumerate(norms, 1):
        warnings.append(guard.spike(norm, update))
        guard.record(norm)
    return warnings


def test_asking_for_a_spike_records_nothing():
    guard = Guard(OptimizerConfig(), None)  # type: ignore[arg-type]
    for _ in range(LEAST):
        guard.record(1.0)
    before = guard.state()
    assert guard.spike(100.0, 9) and guard.spike(100.0, 9)
    assert guard.state() == before


def test_a_recorded_update_ends_a_row_of_skipped_ones():
    guard = Guard(OptimizerConfig(on_nonfinite="skip_update"), None)  # type: ignore[arg-type]
    guard.skip("the loss is nan", 1)
    guard.record(1.0)
    assert guard.state() == {"norms": [1.0], "skipped_in_a_row": 0}


def test_a_stop_is_explained_to_the_user():
    assert issubclass(NotFinite, UserError)


def test_a_spike_is_measured_by_the_median_of_those_before():
    reports = spikes([1.0, 3.0] * 4 + [10.1, 2.0, 9.9])
    assert [k for k, text in enumerate(reports) if text] == [
        8
    ]  # 10.1 > 5 x 2; with 10.1 in the window the median is still 2
    assert reports[8] == "update 9: the gradient norm is 10.1, 5.0 times the median of the updates before"


def test_too_few_updates_or_no_factor_report_no_spike():
    assert not any(spikes([1.0] * (LEAST - 1) + [100.0]))
    assert any(spikes([1.0] * LEAST + [100.0]))
    assert not any(spikes([1.0] * LEAST + [100.0], spike_factor=None))
    assert not any(
        spikes([0.0] * LEAST + [100.0])
    )  # no advantage anywhere until now: nothing to compare with


def test_a_checkpoint_keeps_what_the_guard_knows():
    # type: ignore[arg-type]
    guard, other = (Guard(OptimizerConfig(on_nonfinite="skip_update"), None) for _ in range(2))
    for k in range(100):
        guard.record(float(k))
    guard.skip("the loss is nan", 101)
    other.load_state(guard.state())
    assert list(other.norms) == [float(k) for k in range(36, 100)] and other.skipped_in_a_row == 1
    assert other.spike(68.0 * 5, 101) and not guard.spike(67.5 * 5, 101)  # the median of 36 to 99 is 67.5


def result(loss: float, tokens: int, gap: float, *, warning: str = "") -> UpdateResult:
    """Of an update that is skipped when it comes with a warning."""
    return UpdateResult(
        loss=loss,
        grad_norm=2 * loss,
        num_tokens=tokens,
        num_micro_batches=1,
        lr=loss,
        skipped=bool(warning),
        metrics={
            "gap_max": Max(gap),
            "skipped_updates": Count(bool(warning)),
            "masked": Mean(0.0, tokens),
        },
        warnings=(warning,) if warning else (),
    )


def test_a_skipped_update_is_in_no_mean_of_the_step():
    skipped = result(math.nan, 0, -math.inf, warning="skipped")
    step = combine([result(1.0, 10, 0.5), skipped, result(4.0, 20, 0.25)])
    assert step.loss == pytest.approx(3.0) and step.grad_norm == pytest.approx(6.0)
    assert (step.num_tokens, step.num_updates, step.num_micro_batches) == (30, 2, 3)
    assert step.lr == 4.0 and step.warnings == ("skipped",)
    assert flatten(step.metrics) == {"gap_max": 0.5, "skipped_updates": 1.0, "masked": 0.0}


def test_a_step_of_skipped_updates_alone_has_no_loss():
    step = combine([result(math.nan, 0, -math.inf, warning="skipped")] * 2)
    assert math.isnan(step.loss) and math.isnan(step.grad_norm) and step.num_updates == 0
