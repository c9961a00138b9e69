"""One batch on every layout: the cases, the model and samples they share, and the reference that they are
compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support import reference
from support.cases import Budget, PolicyRun
from support.models import make_tiny_model
from support.ranks import run_ranks
from support.samples import make_samples

LR, EPS = 1e-3, 1e-5
RELATIVE = 1e-5  # of loss, gradient norm and, by parameter, the length of the gradient's error
WEIGHTS = 2e-5  # absolute, after three updates that move a weight by up to 3e-3

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and a way to split the batch over updates and micro-batches. policy: keys of the section
    `policy`; offload: share of the optimizer's state that is in host memory.
    """

    layout: str = "tp1"
    tied: bool = False
    num_updates: int = 2
    budget: Budget = "half"
    distributed: bool = True
    dtype: str = "fp32"
    policy: tuple[str, ...] = ()
    offload: float = 0.0

    @property
    def name(self) -> str:
        words = [self.layout, "tied" if self.tied else "untied", f"{self.num_updates}up", self.budget]
        words += ["bf16"] if self.dtype == "bf16" else []
        words += [f"offload_{self.offload}"] if self.offload else []
        words += [word.replace("=true", "").replace("=", "_") for word in self.policy]
        words += [] if self.distributed else ["whole"]
        return "-".join(words)

    def overrides(self) -> list[str]:
        return [
            f"optimizer.lr={LR}",
            f"optimizer.eps={EPS}",
            f"optimizer.distributed={self.distributed}",
            f"optimizer.cpu_offload={self.offload}",
            f"model.dtype={self.dtype}",
            *(f"policy.{item}" for item in self.policy),
        ]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the reference says of three updates: loss and gradient norm of each, gradients of the first,
    weights after all.
    """

    results: list[tuple[float, float]]
    gradients: Tensors
    weights: Tensors


class World:
    """A model with and without tied embeddings, samples with old log-probabilities that reach every clip, and
    the reference's updates on them.
    """

    def __init__(self, folder: Path, **model: Any) -> None:
        self.folder = folder
        shape: dict[str, Any] = dict(layers=4, heads=8, kv_heads=4, hidden=128, ffn=96) | model
        self.models = {t: str(make_tiny_model(folder / f"model-{t}", tied=t, **shape)) for t in (False, True)}
        self.samples = make_samples()
        self.old: dict[bool, list[torch.Tensor]] = {}
        for tied, path in self.models.items():
            noise = torch.Generator().manual_seed(5)
            self.old[tied] = []
            loaded = reference.load(path)
            with torch.no_grad():
                for sample in self.samples:
                    now = torch.cat([torch.zeros(1), reference.logprobs(loaded, sample)])
                    off = torch.randn(len(now), generator=noise) * 0.25
                    # ratios of about 20: the dual clip
                    off -= 3.0 * (torch.rand(len(now), generator=noise) < 0.05)
                    self.old[tied].append((now + off).float().double())

    def expected(self, tied: bool, num_updates: int, stored: torch.dtype = torch.float32) -> Expected:
        """Three updates of the reference, on the first, second ... part of the samples in turn."""
        trainer = reference.Trainer(self.models[tied], lr=LR, eps=EPS, stored=stored)
        size = len(self.samples) // num_updates
        results, gradients = [], {}
        for k in range(3):
            start = k % num_updates * size
            part = slice(start, start + size)
            results.append(trainer.update(self.samples[part], self.old[tied][part]))
            gradients = gradients or trainer.gradients()
        return Expected(results=results, gradients=gradients, weights=trainer.weights())

    def measure(
        self, ranks: int, cases: Sequence[Case], run: Callable[..., list[Any]] = run_ranks
    ) -> list[dict[str, Any]]:
        """By rank and name of the case: the reports of three updates (support.jobs_policy.measure)."""
        runs = [
            PolicyRun(
                name=case.name,
                model=self.models[case.tied],
                layout=case.layout,
                overrides=case.overrides(),
                num_updates=case.num_updates,
                budget=case.budget,
            )
            for case in cases
        ]
        old = {self.models[tied]: torch.cat(parts).tolist() for tied, parts in self.old.items()}
        return run(
            "support.jobs_policy:measure",
            ranks,
            runs=runs,
            old_logprobs=old,
            folder=str(self.folder),
            timeout_s=550,
        )

    def exported(self, name: str) -> Tensors:
        files = (self.folder / name).glob("*.safetensors")
        return {key: tensor for file in files for key, tensor in load_file(file).items()}


def check(world: World, expected: Expected, by_rank: list[dict[str, Any]], case: Case) -> None:
    """The case's reports are alike on all its ranks, and loss, norm, gradients and weights are the
    reference's.
    """
    reported = [ranks[case.name] for ranks in by_rank if case.name in ranks]
    assert all(report == reported[0] for report in reported), "the ranks disagree on what they report"
    for update, (loss, grad_norm) in zip(reported[0], expected.results, strict=True):
        assert update["loss"] == pytest.approx(loss, rel=RELATIVE)
        assert update["grad_norm"] == pytest.approx(grad_norm, rel=RELATIVE)
    gradients = world.exported(f"{case.name}-gradients")
    assert gradients.keys() == expected.gradients.keys()
    errors = {
        key: float((gradients[key].double() - wanted).norm() / wanted.norm())
        for key, wanted in expected.gradients.items()
    }
    assert max(errors.values()) < RELATIVE, sorted(errors.items(), key=lambda item: -item[1])[:5]
    weights = world.exported(case.name)
    assert weights.keys() == expected.weights.keys()
    gaps = {
        key: float((weights[key].double() - wanted).abs().max()) for key, wanted in expected.weights.items()
    }
    assert max(gaps.values()) < WEIGHTS, sorted(gaps.items(), key=lambda item: -item[1])[:5]
