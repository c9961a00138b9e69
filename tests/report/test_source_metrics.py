"""What a step reports of each of several data sources, by hand."""

from __future__ import annotations

from support.samples import make_group, make_prompt

from megatron_dapo.report.step import source_metrics
from megatron_dapo.types import Collected, Group, GroupFacts


def group(position: int, source: str | None, correct: int, length: int) -> Group:
    return make_group(make_prompt(position, source=source), correct, lengths=(length,) * 4)


def test_each_source_has_its_accuracy_lengths_and_share():
    """Carried groups are trained on without being among those that finished in this step."""
    easy, hard, other = group(0, "easy", 4, 10), group(1, "easy", 2, 20), group(2, "hard", 1, 40)
    carried = group(3, "late", 2, 5)
    facts = [GroupFacts.of(g, verdict) for g, verdict in ((easy, "all_correct"), (hard, "accepted"))]
    facts.append(GroupFacts.of(other, "accepted"))
    collected = Collected(groups=(hard, other, carried), sampled=tuple(facts), counts={})
    assert source_metrics(collected) == {
        "source/easy/groups_sampled": 2,
        "source/easy/groups_accepted": 1,
        "source/easy/accuracy": 0.75,
        "source/easy/length_mean": 15.0,
        "source/hard/groups_sampled": 1,
        "source/hard/groups_accepted": 1,
        "source/hard/accuracy": 0.25,
        "source/hard/length_mean": 40.0,
        "source/late/groups_sampled": 0,
        "source/late/groups_accepted": 1,
    }


def test_a_run_without_sources_reports_none():
    one = group(0, None, 1, 3)
    assert (
        source_metrics(Collected(groups=(one,), sampled=(GroupFacts.of(one, "accepted"),), counts={})) == {}
    )
