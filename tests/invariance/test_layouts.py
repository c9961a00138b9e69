"""One batch, every layout, every split: the same loss, gradients and weights, and those are the paper's."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from jobs import make_samples, plan
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import make_tiny_model

from megatron_dapo.layout import Layout

LR, EPS = 1e-3, 1e-5
RELATIVE = 1e-5  # of loss, gradient norm and, by parameter, the length of the gradient's error
WEIGHTS = 2e-5  # absolute, after three updates that move a weight by up to 3e-3

BASE = {"layout": "tp1", "tied": False, "num_updates": 2, "budget": "half", "distributed": True, "dtype": "fp32"}
BASE |= {"policy": (), "offload": 0.0}
RECOMPUTE_ALL = ("recompute=full",)
RECOMPUTE_SOME = ("recompute=selective", "recompute_modules=[core_attn,mlp,layernorm]")
OVERLAP = ("overlap_grad_reduce=true", "overlap_param_gather=true")
ON_2 = [
    {},
    {"tied": True},
    {"num_updates": 1},
    {"budget": "one"},
    {"budget": "all", "distributed": False},
    {"layout": "tp2"},
    {"layout": "tp2", "tied": True, "distributed": False},
    {"layout": "tp2_sp"},
    {"layout": "tp2_sp", "tied": True, "budget": "one"},
    {"layout": "pp2"},
    {"layout": "pp2", "tied": True},
    {"layout": "pp2", "budget": "one"},
    {"layout": "pp2", "budget": "all", "num_updates": 1},
    {"layout": "dp2"},
    {"layout": "dp2", "tied": True},
    {"layout": "dp2", "budget": "one", "num_updates": 1},
    {"layout": "dp2", "budget": "all", "distributed": False},
    {"num_updates": 4},
    {"layout": "cp2"},
    {"layout": "cp2", "tied": True, "budget": "one"},
    {"layout": "pp2_vpp2", "budget": "one"},
    {"layout": "pp2_vpp2", "tied": True},
    {"policy": RECOMPUTE_ALL},
    {"layout": "tp2_sp", "policy": RECOMPUTE_SOME},
    {"layout": "dp2", "policy": OVERLAP},
]
BF16 = [{"layout": layout, "dtype": "bf16"} for layout in ("tp1", "tp2_sp", "pp2_vpp2", "cp2", "dp2")]
OFFLOAD = [
    {"layout": "dp2", "dtype": "bf16", "offload": 1.0},
    {"layout": "dp2", "dtype": "bf16", "offload": 0.5, "policy": OVERLAP},
]
ON_4 = [
    {"layout": "tp2_sp_pp2"},
    {"layout": "tp2_cp2"},
    {"layout": "tp2_sp_cp2", "tied": True, "budget": "one", "num_updates": 4},
    {"layout": "dp2_cp2", "policy": OVERLAP},
    {"layout": "tp2_sp_pp2_vpp2", "policy": (*RECOMPUTE_ALL, *OVERLAP)},
]
ON_8 = [
    {"layout": "tp2_pp2_dp2"},
    {"layout": "tp2_pp2_dp2", "tied": True, "budget": "one"},
    {"layout": "tp2_pp2_dp2", "tied": True, "num_updates": 1, "distributed": False},
    {"layout": "pp2_vpp2_cp2_dp2", "tied": True, "policy": OVERLAP},
]
EXTRA = [  # everything else on two ranks
    {"layout": layout, "tied": tied, "num_updates": updates, "budget": budget, "distributed": distributed}
    for layout in ("tp1", "tp2", "tp2_sp", "pp2", "pp2_vpp2", "cp2", "dp2")
    for tied in (False, True)
    for updates in (1, 2, 4)
    for budget in ("one", "half", "all")
    for distributed in (True, False)
]


Tensors = dict[str, torch.Tensor]
Expected = tuple[
    list[tuple[float, float]], Tensors, Tensors
]  # (loss, gradient norm) of each update; first gradients; last weights


def name_of(case: dict[str, Any]) -> str:
    case = BASE | case
    words = [case["layout"], "tied" if case["tied"] else "untied", f"{case['num_updates']}up", case["budget"]]
    words += ["bf16"] * (case["dtype"] == "bf16")
    words += [f"offload_{case['offload']}"] * (case["offload"] > 0)
    words += [word.replace("=true", "").replace("=", "_") for word in case["policy"]]
    return "-".join(words) + ("" if case["distributed"] else "-whole")


EXTRA = [case for case in EXTRA if name_of(case) not in {name_of(c) for c in ON_2}]


class World:
    """The models, the samples with old log-probabilities that reach every clip, and the reference's two updates."""

    def __init__(self, folder: Path, **model: Any) -> None:
        self.folder = folder
        shape: dict[str, Any] = dict(layers=4, heads=8, kv_heads=4, hidden=128, ffn=96) | model
        self.models = {t: str(make_tiny_model(folder / f"model-{t}", tied=t, **shape)) for t in (False, True)}
        self.samples = make_samples()
        self.old: dict[bool, list[torch.Tensor]] = {}
        for tied, model in self.models.items():
            noise = torch.Generator().manual_seed(5)
            self.old[tied] = []
            loaded = reference.load(model)
            with torch.no_grad():
                for sample in self.samples:
                    now = torch.cat([torch.zeros(1), reference.logprobs(loaded, sample)])
                    off = torch.randn(len(now), generator=noise) * 0.25
                    off -= 3.0 * (torch.rand(len(now), generator=noise) < 0.05)  # ratios of about 20: the dual clip
                    self.old[tied].append((now + off).float().double())

    def halves(self, num_updates: int) -> list[slice]:
        size = len(self.samples) // num_updates
        return [slice(k * size, (k + 1) * size) for k in range(num_updates)]

    def expected(self, tied: bool, num_updates: int, stored: torch.dtype = torch.float32) -> Expected:
        trainer = reference.Trainer(self.models[tied], lr=LR, eps=EPS, stored=stored)
        parts = self.halves(num_updates)
        results = []
        gradients: dict[str, torch.Tensor] = {}
        for k in range(3):
            part = parts[k % num_updates]
            results.append(trainer.update(self.samples[part], self.old[tied][part]))
            gradients = gradients or trainer.gradients()
        return results, gradients, trainer.weights()

    def measure(self, ranks: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        runs = []
        for case in cases:
            full = BASE | case
            overrides = [f"optimizer.lr={LR}", f"optimizer.eps={EPS}", f"optimizer.distributed={full['distributed']}"]
            overrides += [f"model.dtype={full['dtype']}", f"optimizer.cpu_offload={full['offload']}"]
            overrides += [f"policy.{item}" for item in full["policy"]]
            runs.append(full | {"name": name_of(case), "model": self.models[full["tied"]], "overrides": overrides})
        old = {self.models[tied]: torch.cat(parts).tolist() for tied, parts in self.old.items()}
        return run_ranks("jobs:measure", ranks, runs=runs, old_logprobs=old, folder=str(self.folder), timeout_s=550)

    def exported(self, name: str) -> dict[str, torch.Tensor]:
        files = (self.folder / name).glob("*.safetensors")
        return {key: tensor for file in files for key, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def expected(world):
    return {(tied, updates): world.expected(tied, updates) for tied in (False, True) for updates in (1, 2, 4)}


@pytest.fixture(scope="module")
def on_2(world):
    return world.measure(2, ON_2)


@pytest.fixture(scope="module")
def on_2_in_bf16(world):
    return world.measure(2, BF16 + [{"layout": "dp2", "dtype": "bf16", "policy": OVERLAP}, *OFFLOAD])


@pytest.fixture(scope="module")
def on_4(world):
    return world.measure(4, ON_4)


@pytest.fixture(scope="module")
def on_8(world):
    return world.measure(8, ON_8)


@pytest.fixture(scope="module")
def extra(world):
    """Results of a layout's cases, from one launch of ranks each: a hundred policies one after another wear a process out."""
    return functools.cache(lambda layout: world.measure(2, [case for case in EXTRA if case["layout"] == layout]))


def check(world: World, expected: dict, by_rank: list[dict], case: dict[str, Any]) -> None:
    name, case = name_of(case), BASE | case
    results, gradients, weights = expected[case["tied"], case["num_updates"]]
    reported = [ranks[name] for ranks in by_rank if name in ranks]
    assert all(report == reported[0] for report in reported), "the ranks disagree on what they report"
    for update, (loss, grad_norm) in zip(reported[0], results, strict=True):
        assert update["loss"] == pytest.approx(loss, rel=RELATIVE)
        assert update["grad_norm"] == pytest.approx(grad_norm, rel=RELATIVE)
    found = world.exported(f"{name}-gradients")
    assert found.keys() == gradients.keys()
    errors = {key: float((found[key].double() - gradients[key]).norm() / gradients[key].norm()) for key in gradients}
    assert max(errors.values()) < RELATIVE, sorted(errors.items(), key=lambda item: -item[1])[:5]
    exported = world.exported(name)
    assert exported.keys() == weights.keys()
    gaps = {key: float((exported[key].double() - weights[key]).abs().max()) for key in weights}
    assert max(gaps.values()) < WEIGHTS, sorted(gaps.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("case", ON_2, ids=name_of)
def test_two_ranks_equal_the_reference(world, expected, on_2, case):
    check(world, expected, on_2, case)


@pytest.mark.parametrize("case", ON_4, ids=name_of)
def test_four_ranks_equal_the_reference(world, expected, on_4, case):
    check(world, expected, on_4, case)


@pytest.mark.parametrize("case", BF16, ids=name_of)
def test_bf16_stays_close_to_the_reference(world, on_2_in_bf16, case):
    """The first update only: the next one starts from weights whose smallest gradients' signs bf16 has changed."""
    (loss, grad_norm), *_ = world.expected(False, 2, torch.bfloat16)[0]
    first = next(ranks[name_of(case)] for ranks in on_2_in_bf16 if name_of(case) in ranks)[0]
    assert first["loss"] == pytest.approx(loss, rel=2e-2)
    assert first["grad_norm"] == pytest.approx(grad_norm, rel=2e-2)


@pytest.mark.parametrize("case", OFFLOAD, ids=name_of)
def test_an_offloaded_optimizer_changes_no_bit(world, on_2_in_bf16, case):
    name, plain = name_of(case), name_of(case | {"offload": 0.0})
    for ranks in on_2_in_bf16:
        assert ranks[name] == ranks[plain]
    found, expected = world.exported(name), world.exported(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("case", ON_8, ids=name_of)
def test_eight_ranks_equal_the_reference(world, expected, on_8, case):
    check(world, expected, on_8, case)


def test_clips_and_entropy_equal_the_reference(world, on_2):
    tokens = low = high = kl = entropy = 0.0
    model = reference.load(world.models[False])
    for sample, old in zip(world.samples[:6], world.old[False], strict=False):
        with torch.no_grad():
            probabilities = model(torch.tensor(sample.tokens)[None]).logits[0, :-1].softmax(-1)
        for t in range(1, len(sample.tokens)):
            if sample.response_mask[t]:
                p = probabilities[t - 1]
                log_ratio = float(p[sample.tokens[t]].log() - old[t])
                ratio = math.exp(log_ratio)
                tokens += 1
                low += sample.advantage < 0 and ratio < 0.8
                high += sample.advantage > 0 and ratio > 1.28
                kl += ratio - 1 - log_ratio
                entropy -= float((p * p.log()).sum())
    assert low > 0 and high > 0
    for name in ("tp1-untied-2up-half", "tp2-untied-2up-half", "dp2-untied-2up-half"):
        found = on_2[0][name][0]
        assert found["clip_low"] == pytest.approx(low / tokens, abs=1e-9)
        assert found["clip_high"] == pytest.approx(high / tokens, abs=1e-9)
        assert found["kl_old"] == pytest.approx(kl / tokens, rel=1e-4)
        assert found["entropy"] == pytest.approx(entropy / tokens, rel=1e-5)


# --- would the bugs that others shipped be seen on this batch? ----------------------------------------------------------


def weighted(world: World, weights: list[float]) -> tuple[float, float]:
    """Loss and gradient norm where every trained token of sample i counts `weights[i]`."""
    model = reference.load(world.models[False])
    losses = reference.sample_losses(model, world.samples, world.old[False])
    loss = torch.stack([w * part.sum() for w, part in zip(weights, losses, strict=True)]).sum()
    loss.backward()
    return float(loss.detach()), math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))


def wrong_weights(world: World, mistake: str) -> list[float]:
    counts = [sum(s.response_mask) for s in world.samples]
    (ranks,) = (mini.micro_batches for mini in plan(world.samples, Layout(dp=2), num_updates=1, budget="one").mini_batches)
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
    assert weighted(world, wrong_weights(world, "none")) == pytest.approx((found["loss"], found["grad_norm"]), rel=RELATIVE)


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
@pytest.mark.parametrize("case", EXTRA, ids=name_of)
def test_every_combination_on_two_ranks_equals_the_reference(world, expected, extra, case):
    check(world, expected, extra(case["layout"]), case)
