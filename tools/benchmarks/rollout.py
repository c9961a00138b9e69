"""`bench.py rollout`: what tokens cost the controller and the engines, beside the budgets of a step of
512 x 16 responses (see tools/bench.py).
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import scale, wire


def run(options: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    if options.only != "scale":
        report["wire"] = wire.measure(prompts=options.prompts, samples=options.samples, tokens=options.tokens)
    if options.only != "wire":
        report["scale"] = {
            "event_loop": scale.event_loop(options.simulated_tokens, options.samples),
            "collector": scale.collector(options.collector_prompts),
            "memory": scale.memory(options.held_tokens, options.samples),
            "rollout_file": scale.rollout_file(options.saved_tokens, options.samples),
        }
    return report
