"""The mismatch correction on any split: loss, gradient norm and what is reported equal a float64 loop over
whole sequences.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import reference
from support.cases import PolicyRun
from support.models import make_tiny_model
from support.ranks import run_ranks
from support.samples import make_samples

CORRECTIONS = {
    "none": ("none", "token", None, 2.0),
    "truncate-token": ("truncate", "token", None, 1.2),
    "truncate-sequence": ("truncate", "sequence", None, 1.5),
    "mask-token": ("mask", "token", 0.8, 1.25),
    "mask-sequence": ("mask", "sequence", 0.2, 3.0),
}
SPLITS = {
    "tp1-one": ("tp1", "one"),
    "dp2-half": ("dp2", "half"),
    "pp2-all": ("pp2", "all"),
    "tp2_sp-half": ("tp2_sp", "half"),
}
CASES = [(c, "dp2-half") for c in CORRECTIONS] + [
    (c, s) for c in ("mask-sequence", "truncate-token") for s in SPLITS if s != "dp2-half"
]


def arguments(correction: str) -> list[str]:
    kind, level, low, high = CORRECTIONS[correction]
    values = {"correction": kind, "level": level, "low": "null" if low is None else low, "high": high}
    return [f"objective.mismatch_{key}={value}" for key, value in values.items()]


class World:
    """A model, samples, and old log-probabilities near those of the engine for some samples and far from them
    for others.
    """

    def __init__(self, folder: Any) -> None:
        self.folder = folder
        self.model = str(
            make_tiny_model(folder / "model", tied=True, layers=2, heads=4, kv_heads=2, hidden=64, ffn=64)
        )
        self.samples = make_samples()
        noise = torch.Generator().manual_seed(2)
        self.old = []
        for i, sample in enumerate(self.samples):
            scale = (0.02, 0.1, 0.4)[i % 3]
            rollout = sample.rollout_logprobs
            self.old.append((rollout + scale * torch.randn(len(rollout), generator=noise)).double())

    def expected(self, correction: str) -> dict[str, float]:
        kind, level, low, high = CORRECTIONS[correction]
        model = reference.load(self.model)
        losses = reference.sample_losses(model, self.samples, self.old)
        total, trained, log_ws, ws = torch.zeros((), dtype=torch.float64), 0, [], []
        for sample, old, part in zip(self.samples, self.old, losses, strict=True):
            tokens = sample.response_mask.nonzero().flatten().tolist()
            logs = [float(old[t]) - float(sample.rollout_logprobs[t]) for t in tokens]
            for loss, log_w in zip(part, logs, strict=True):
                w = math.exp(sum(logs) if level == "sequence" else log_w)
                log_ws.append(log_w)
                ws.append(w)
                if kind == "mask" and not (low or 0) <= w <= high:
                    continue
                total = total + loss * {"none": 1.0, "truncate": min(w, high), "mask": w}[kind]
                trained += 1
        (total / trained).backward()
        num = len(ws)
        return {
            "loss": float(total.detach()) / trained,
            "grad_norm": math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())),
            "gap": sum(map(abs, log_ws)) / num,
            "gap_max": max(map(abs, log_ws)),
            "kl_k1": -sum(log_ws) / num,
            "kl_k3": sum(math.exp(x) - 1 - x for x in log_ws) / num,
            "ess": sum(ws) ** 2 / num / sum(w * w for w in ws),
            "masked": 1 - trained / num,
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("mismatch"))


@pytest.fixture(scope="module")
def measured(world):
    runs = [
        PolicyRun(
            name=f"{correction}-{split}",
            model=world.model,
            layout=SPLITS[split][0],
            budget=SPLITS[split][1],
            overrides=arguments(correction),
        )
        for correction, split in CASES
    ]
    old = {world.model: torch.cat(world.old).tolist()}
    return run_ranks(
        "support.jobs_policy:measure",
        2,
        runs=runs,
        old_logprobs=old,
        folder=str(world.folder),
        timeout_s=550,
    )[0]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_corrected_update_equals_the_loop(world, measured, case):
    expected, found = world.expected(case[0]), measured["-".join(case)][0]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_the_corrections_do_differ_on_these_samples(world):
    found = {name: world.expected(name) for name in CORRECTIONS}
    losses = sorted(values["loss"] for values in found.values())
    assert min(b - a for a, b in zip(losses, losses[1:], strict=False)) > 1e-3
    assert 0.05 < found["mask-token"]["masked"] < 0.95 and 0.05 < found["mask-sequence"]["masked"] < 0.95
