"""A step's line of facts.jsonl, by hand."""

from __future__ import annotations

import dataclasses
import json

from support.samples import make_group, make_prompt

from megatron_dapo.report.facts import step_facts
from megatron_dapo.report.lines import JsonLines
from megatron_dapo.types import Collected, GroupFacts, Timing


def test_the_line_of_a_step(tmp_path):
    trained = make_group(make_prompt(4, tokens=(1, 2, 3)), correct=1, lengths=(5, 7), version=2)
    easy = dataclasses.replace(
        make_group(make_prompt(3), correct=1, lengths=(2,), version=1),
        timing=Timing(engine="engine_1", sent=10.5, answered=12.0, graded=12.25),
    )
    sampled = (GroupFacts.of(easy, "all_correct"), GroupFacts.of(trained, "accepted"))
    collected = Collected(groups=(trained,), sampled=sampled, counts={})
    facts = step_facts(collected, began=10.0, phases=[("rollout", 10.0, 13.0)], trained_tokens=12)
    lines = JsonLines(tmp_path / "facts.jsonl", None)
    lines.record(1, facts)
    lines.close()
    assert json.loads((tmp_path / "facts.jsonl").read_text()) == {
        "step": 1,
        "began": 10.0,
        "phases": [["rollout", 10.0, 13.0]],
        "trained_tokens": 12,
        "prompt_tokens_trained": 6,
        "groups": [
            {
                "position": 3,
                "row": 3,
                "prompt_tokens": 2,
                "lengths": [2],
                "correct": [True],
                "truncated": [False],
                "weight_version": 1,
                "verdict": "all_correct",
                "source": None,
                "timing": ["engine_1", 10.5, 12.0, 12.25],
            },
            {
                "position": 4,
                "row": 4,
                "prompt_tokens": 3,
                "lengths": [5, 7],
                "correct": [True, False],
                "truncated": [False, False],
                "weight_version": 2,
                "verdict": "accepted",
                "source": None,
                "timing": None,
            },
        ],
    }
