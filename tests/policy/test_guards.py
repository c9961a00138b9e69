"""NaN and infinity on a real policy: named with their rank, and the weights are those before the update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from jobs import _state, make_samples, open_policy, plan
from ranks import run_ranks
from tiny import make_tiny_model

from megatron_dapo.config import OptimizerConfig
from megatron_dapo.policy.guards import LEAST, Guard
from megatron_dapo.policy.step import combine
from megatron_dapo.report.metrics import Count, Max, Mean, flatten
from megatron_dapo.types import StepResult

EARLIER, NAME = "decoder.layers.0.self_attention.linear_proj.weight", "decoder.layers.1.mlp.linear_fc2.weight"


@contextlib.contextmanager
def poison(policy: Any, batch: Any, *, rank: int = 0, names: Sequence[str] = (EARLIER, NAME), **values: float) -> Iterator[None]:
    """One bad value for the time of an update: an advantage of the batch, or on one rank a gradient, a parameter before the update,
    or a parameter `after` it."""
    from megatron_dapo.policy.model import named_shards

    advantages, optimizer, hooks = batch.advantages_N.clone(), policy.optimizer, []
    if "advantage" in values:
        batch.advantages_N[2] = values["advantage"]
    if policy.place.rank == rank:
        named = dict(named_shards(policy.chunks))
        if "gradient" in values:
            for name in named.keys() & names:
                hooks.append(named[name].register_hook(lambda gradient: torch.full_like(gradient, values["gradient"])))
        if "parameter" in values:
            named[NAME].data.view(-1)[5] = values["parameter"]
        if "after" in values:
            step = optimizer.step_with_ready_grads
            optimizer.step_with_ready_grads = lambda: (step(), named[NAME].data.fill_(values["after"]))
    yield
    batch.advantages_N.copy_(advantages)
    for hook in hooks:
        hook.remove()


def update(policy: Any, batch: Any, values: dict[str, Any]) -> dict[str, Any]:
    """One update, poisoned on the way, and what became of it on this rank."""
    from megatron_dapo.policy.guards import NotFinite

    with poison(policy, batch, **values):
        before, rate, message, result = _state(policy), policy.optimizer.param_groups[0]["lr"], "", None
        try:
            result = policy.update(batch, 0)
        except NotFinite as error:
            message = str(error)
        return {
            "raised": message,
            "warnings": list(result.warnings) if result else [],
            "skipped": flatten(result.metrics)["skipped_updates"] if result else None,
            "tokens": result.num_tokens if result else None,
            "grad_norm": result.grad_norm if result else None,
            "untouched": _state(policy) == before,
            "same_rate": policy.optimizer.param_groups[0]["lr"] == rate,
            "num_updates": policy.num_updates,
        }


def poisoned(model: str, folder: str, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every run: a fresh policy of a layout, then its updates one after the other."""
    found = {}
    for name, run in runs.items():
        overrides = ["optimizer.warmup_updates=9", "optimizer.lr=1e-3", *run.get("overrides", [])]
        with open_policy(run["layout"], model, f"{folder}/{name}.store", overrides) as policy:
            if policy is None:
                continue
            batch = plan(make_samples(), policy.place.layout, num_updates=1, budget="half")
            found[name] = [update(policy, batch, values) for values in run["updates"]]
    return found


GOOD: dict[str, Any] = {}
BAD_GRADIENT = {"gradient": math.nan, "rank": 1}
SKIP = ["optimizer.on_nonfinite=skip_update", "optimizer.max_skipped=2"]
RUNS: dict[str, dict[str, Any]] = {
    f"gradient-{layout}{'' if distributed else '-whole'}": {
        "layout": layout,
        "overrides": [f"optimizer.distributed={distributed}"],
        "updates": [BAD_GRADIENT, GOOD],
    }
    for layout, distributed in (("dp2", True), ("dp2", False), ("tp2", True), ("pp2", True))
}
RUNS |= {
    "infinite gradient": {"layout": "tp1", "updates": [{"gradient": math.inf}]},
    "unclipped": {"layout": "dp2", "overrides": ["optimizer.clip_grad=0"], "updates": [BAD_GRADIENT, GOOD]},
    "replicated": {"layout": "tp2", "updates": [{**BAD_GRADIENT, "names": ["decoder.final_layernorm.weight"]}]},
    "advantage": {"layout": "dp2", "updates": [{"advantage": math.nan}]},
    "parameter": {"layout": "dp2", "updates": [{"parameter": math.nan, "rank": 1}]},
    "huge parameter": {"layout": "tp1", "updates": [{"parameter": 1e30}]},
    "after": {"layout": "dp2", "updates": [{"after": math.inf, "rank": 1}]},
    "skip": {"layout": "dp2", "overrides": SKIP, "updates": [GOOD, BAD_GRADIENT, {"advantage": math.inf}, GOOD, BAD_GRADIENT]},
    "limit": {"layout": "dp2", "overrides": SKIP, "updates": [BAD_GRADIENT, BAD_GRADIENT, BAD_GRADIENT]},
    "never bad": {"layout": "dp2", "overrides": SKIP, "updates": [GOOD, GOOD]},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guards")
    model = str(make_tiny_model(folder / "model", tied=True, layers=2, heads=4, kv_heads=2, hidden=64, ffn=64))
    return run_ranks("policy.test_guards:poisoned", 2, model=model, folder=str(folder), runs=RUNS)


def on_each_rank(found: list[dict[str, Any]], name: str) -> list[list[dict[str, Any]]]:
    return [rank[name] for rank in found if name in rank]


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("gradient") or name == "unclipped"])
def test_a_bad_gradient_stops_every_rank_and_names_tensor_and_rank(found, name):
    for bad, good in on_each_rank(found, name):
        assert f"rank 1: gradient of {NAME}" in bad["raised"] and "rank 0" not in bad["raised"]
        assert ("and 1 more" in bad["raised"]) == ("pp2" not in name)  # the last of the two, where backward begins
        assert (
            "update 1: the gradient is not finite (norm nan; rank" in bad["raised"]
            and "the weights were not changed" in bad["raised"]
        )
        assert bad["untouched"] and bad["same_rate"] and bad["num_updates"] == 0
        assert not good["untouched"] and math.isfinite(good["grad_norm"]) and good["num_updates"] == 1


def test_an_infinite_gradient_is_seen_too(found):
    ((bad,),) = on_each_rank(found, "infinite gradient")
    assert f"rank 0: gradient of {NAME}" in bad["raised"] and bad["untouched"]


def test_a_bad_gradient_that_the_norm_does_not_count_is_seen(found):
    """Megatron's norm takes a replicated tensor from the first tensor-parallel rank alone."""
    for (bad,) in on_each_rank(found, "replicated"):
        assert "(norm nan" not in bad["raised"] and "rank 1: gradient of decoder.final_layernorm.weight)" in bad["raised"]
        assert bad["untouched"]


def test_a_bad_loss_names_what_in_the_batch_and_where(found):
    ranks = on_each_rank(found, "advantage")
    assert len(ranks) == 2
    for (bad,) in ranks:
        assert "the loss is nan (advantages_N[2] of the batch is nan; rank " in bad["raised"]
        assert "loss of micro-batch" in bad["raised"] and bad["untouched"]


def test_a_bad_parameter_names_itself(found):
    for (bad,) in on_each_rank(found, "parameter"):
        assert f"the loss is nan (rank 1: parameter {NAME})" in bad["raised"] and bad["untouched"]


def test_a_norm_that_overflows_is_no_bad_parameter(found):
    ((good,),) = on_each_rank(found, "huge parameter")
    assert not good["raised"] and not good["untouched"]


def test_weights_spoilt_by_the_update_stop_whatever_is_configured(found):
    for (bad,) in on_each_rank(found, "after"):
        assert f"after update 1 the weights are not finite (rank 1: parameter {NAME})" in bad["raised"]
        assert "resume from the last checkpoint" in bad["raised"]


def test_a_skipped_update_did_not_happen(found):
    for rank in range(2):
        first, second, third, fourth, last = found[rank]["skip"]
        assert [u["skipped"] for u in found[rank]["skip"]] == [0, 1, 1, 0, 1]
        assert second["untouched"] and second["same_rate"] and second["num_updates"] == 1 and second["tokens"] == 0
        assert third["untouched"] and "the loss is" in third["warnings"][0] and "(2 in a row)" in third["warnings"][0]
        assert not fourth["untouched"] and not fourth["same_rate"] and fourth["num_updates"] == 2
        assert "(1 in a row)" in last["warnings"][0]  # a good update in between starts the count anew
        assert f"rank 1: gradient of {NAME}" in second["warnings"][0]
        # and the update after the skipped ones is the one that would have come without them
        same = found[rank]["never bad"]
        assert [first["grad_norm"], fourth["grad_norm"]] == [u["grad_norm"] for u in same]


def test_the_limit_of_skipped_updates_stops(found):
    for rank in range(2):
        *skipped, last = found[rank]["limit"]
        assert [u["skipped"] for u in skipped] == [1, 1] and not any(u["raised"] for u in skipped)
        assert "optimizer.max_skipped=2 updates were skipped just before" in last["raised"] and last["untouched"]


# --- without ranks -----------------------------------------------------------------------------------------------------------


def spikes(norms: list[float], **options: Any) -> list[str]:
    guard = Guard(OptimizerConfig(**options), None)  # type: ignore[arg-type]
    return [guard.spike(norm, k + 1) for k, norm in enumerate(norms)]


def test_a_spike_is_measured_by_the_median_of_those_before():
    found = spikes([1.0, 3.0] * 4 + [10.1, 2.0, 9.9])
    assert [k for k, text in enumerate(found) if text] == [8]  # 10.1 > 5 x 2; with 10.1 in the window the median is still 2
    assert found[8] == "update 9: the gradient norm is 10.1, 5.0 times the median of the updates before"


def test_too_few_updates_or_no_factor_report_no_spike():
    assert not any(spikes([1.0] * (LEAST - 1) + [100.0]))
    assert any(spikes([1.0] * LEAST + [100.0]))
    assert not any(spikes([1.0] * LEAST + [100.0], spike_factor=None))
    assert not any(spikes([0.0] * LEAST + [100.0]))  # no advantage anywhere until now: nothing to compare with


def test_a_checkpoint_keeps_what_the_guard_knows():
    guard, other = (Guard(OptimizerConfig(on_nonfinite="skip_update"), None) for _ in range(2))  # type: ignore[arg-type]
    for k in range(100):
        guard.spike(float(k), k + 1)
    guard.skip("the loss is nan", 101)
    other.load_state(guard.state())
    assert list(other.norms) == [float(k) for k in range(36, 100)] and other.skipped_in_a_row == 1
    assert other.spike(68.0 * 5, 101) and not guard.spike(67.5 * 5, 101)  # the median of 36 to 99 is 67.5


def result(loss: float, tokens: int, updates: int, gap: float, warning: str = "") -> StepResult:
    return StepResult(
        loss=loss,
        grad_norm=2 * loss,
        num_tokens=tokens,
        num_updates=updates,
        num_micro_batches=1,
        lr=loss,
        metrics={"gap_max": Max(gap), "skipped_updates": Count(1 - updates), "masked": Mean(0.0, tokens)},
        warnings=(warning,) * bool(warning),
    )


def test_a_skipped_update_is_in_no_mean_of_the_step():
    skipped = result(math.nan, 0, 0, -math.inf, "skipped")
    whole = combine([result(1.0, 10, 1, 0.5), skipped, result(4.0, 20, 1, 0.25)])
    assert (whole.loss, whole.grad_norm, whole.num_tokens, whole.num_updates) == (pytest.approx(3.0), pytest.approx(6.0), 30, 2)
    assert whole.num_micro_batches == 3 and whole.warnings == ("skipped",)
    assert flatten(whole.metrics) == {"gap_max": 0.5, "skipped_updates": 1.0, "masked": 0.0}


def test_a_step_of_skipped_updates_alone_has_no_loss():
    whole = combine([result(math.nan, 0, 0, -math.inf)] * 2)
    assert math.isnan(whole.loss) and math.isnan(whole.grad_norm) and whole.num_updates == 0
