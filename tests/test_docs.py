"""The pages name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.samples import make_group, make_sample

from megatron_dapo.batching.packing import pack
from megatron_dapo.metrics import Mean
from megatron_dapo.objectives.base import trained_tokens
from megatron_dapo.report.engines import EngineLog
from megatron_dapo.report.step import step_metrics
from megatron_dapo.types import Collected, GroupFacts, StepResult

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
NOT_OF_A_STEP = {"step", "eval/accuracy", "time/rollouts_wait"}  # added by the reporter and by the trainer
NOT_OF_A_STEP |= {"memory/policy_training", "memory/policy_sampling", "reward/overlong_factor"}
NOT_OF_A_STEP |= {"data/epochs", "data/seen", "data/solved"}
NOT_OF_A_STEP |= {f"data/passed_over_{reason}" for reason in ("long", "solved", "pool")}


def test_metrics_page_lists_exactly_what_a_step_reports():
    group = make_group(correct=1, size=2)
    names = ("entropy", "clip_low", "clip_high", "clip_dual", "kl_old", "gap", "gap_max", "fresh_tokens")
    names += ("skipped_updates", "grad_norm_spike", "kl_k1", "kl_k3", "ess", "masked")
    samples = [make_sample((3, 4, 5), prompt_length=2)] * 2
    batch = pack(samples, dp=1, num_updates=1, max_tokens=6, version=0, denominator=trained_tokens)
    result = StepResult(
        loss=0.0,
        grad_norm=1.0,
        num_tokens=2,
        num_updates=1,
        num_micro_batches=1,
        lr=1e-6,
        metrics=dict.fromkeys(names, Mean(0.0, 1.0)),
    )
    collected = Collected(groups=(group,), sampled=(GroupFacts.of(group, "accepted"),), counts={})
    counted = dict(reward_seconds=0.0, grades={}, request_failures={}, num_updates=1)
    reported = step_metrics(collected, batch, result, {}, version=0, **counted)
    reported |= EngineLog().metrics([])
    documented = re.findall(
        r"^\| `([a-z0-9_/]+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE
    )
    assert len(documented) == len(set(documented))
    assert set(documented) == reported.keys() | NOT_OF_A_STEP


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links, and repository paths in backticks or after bash and python, that lead nowhere. Images
    are made by runs.
    """
    links = re.findall(r"(?<!!)\[[^\]]*\]\((?!https?:)([^)#]+)\)", text)
    paths = re.findall(r"`((?:tools|tests|examples|docs|megatron_dapo)/[\w./-]+)`", text)
    paths += re.findall(r"\b(?:bash|python) ((?:tools|tests|examples|\.ci)/[\w./-]+)", text)
    return [link for link in links if not (page.parent / link).exists()] + [
        path for path in paths if not (ROOT / path).exists()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_would_be_seen():
    text = "[a](README.md) [b](gone.md) `tools/plot.py` `tools/gone.py` bash tests/gone.sh "
    text += "[c](https://example.org/x)"
    assert broken_links(ROOT / "README.md", text) == ["gone.md", "tools/gone.py", "tests/gone.sh"]
