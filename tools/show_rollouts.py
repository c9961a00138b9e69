#!/usr/bin/env python
"""Print what a run was trained on: prompts, responses, verdicts, rewards.

    python tools/show_rollouts.py runs/tiny_dapo [--step 3] [--prompt 17] [--chars 400]

Without --step the newest step that is still there. Without --prompt every group, long texts cut in the middle
to --chars characters (0: whole); with it the group of that prompt (its position in the stream), whole.
Responses are decoded with the tokenizer of the run's model.path, special tokens shown.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.report.rollouts import load_groups, rollout_path
from megatron_dapo.report.writer import rollout_files
from megatron_dapo.types import Completion, Group

CHARS = 400


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, help="step to show; default: the newest")
    parser.add_argument("--prompt", type=int, metavar="P", help="show the group of this prompt alone, whole")
    parser.add_argument("--chars", type=int, help=f"longest text that is not cut; default {CHARS}, 0: any")
    options = parser.parse_args(arguments)
    chars = options.chars if options.chars is not None else 0 if options.prompt is not None else CHARS
    try:
        config = RunConfig.load(options.run / "config.yaml", [])
        step = options.step if options.step is not None else newest_step(options.run)
        groups, header = load_groups(rollout_path(options.run, step))
        shown = [group for group in groups if options.prompt in (None, group.prompt.position)]
        if not shown:
            positions = ", ".join(str(group.prompt.position) for group in groups)
            raise UserError(f"step {step} has no prompt {options.prompt}; it has {positions}")
        decode = make_decoder(config.model.path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"step {header['step']}: {len(groups)} prompts, sampled by weights {weights_of(groups)}")
    for group in shown:
        print("\n".join(["", *lines_of(group, decode, chars)]))
    return 0


def newest_step(run: Path) -> int:
    """The last step whose rollouts are there. UserError without any."""
    folder = rollout_path(run, 0).parent
    steps = rollout_files(folder)
    if not steps:
        raise UserError(f"no rollout file in {folder}; report.rollouts=true writes one for each step")
    return max(steps)


def make_decoder(model: str) -> Callable[[Any], str]:
    """Token ids to text by the tokenizer of `model`, a folder or a hub name."""
    from transformers import AutoTokenizer

    folder = Path(model).expanduser()
    try:
        return AutoTokenizer.from_pretrained(folder if folder.is_dir() else model).decode
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer could be loaded from model.path={model}: {error}") from error


def weights_of(groups: list[Group]) -> str:
    versions = {version for group in groups for c in group.completions for version, _ in c.versions}
    return ", ".join(map(str, sorted(versions)))


WORDS = {True: "right", False: "wrong", None: "not graded"}


def lines_of(group: Group, decode: Callable[[Any], str], chars: int) -> Iterator[str]:
    """A group for a reader."""
    prompt = group.prompt
    right = f"{group.correct.count(True)} of {len(group.correct)} right"
    source = f" of {prompt.source}" if prompt.source is not None else ""
    rule = f" by {prompt.rule}" if prompt.rule is not None else ""
    yield f"=== prompt {prompt.position} (row {prompt.row}{source}): {right}{rule}, answer {prompt.answer}"
    yield shortened(prompt.text, chars)
    for completion, correct, reward in zip(group.completions, group.correct, group.rewards, strict=True):
        yield (
            f"--- response {completion.number}: {WORDS[correct]}, reward {reward:+.3f}"
            f"{parts_of(completion)}, {described(completion)}"
        )
        yield shortened(decode(completion.tokens.tolist()), chars)


def parts_of(completion: Completion) -> str:
    """What its reward is made of, where it has parts."""
    parts = ", ".join(f"{name} {value:+.3f}" for name, value in completion.reward_parts.items())
    return f" ({parts})" if parts else ""


def described(completion: Completion) -> str:
    """Length, end, weights and mask of a response."""
    runs = " then ".join(f"{version} ({count} tokens)" for version, count in completion.versions)
    versions = runs if len(completion.versions) > 1 else str(completion.weight_version)
    trained = int(completion.trained.sum())
    masked = "" if trained == len(completion.tokens) else f", {trained} tokens trained on"
    end = "cut at the longest length" if completion.truncated else "ended"
    return f"{len(completion.tokens)} tokens, {end}, weights {versions}{masked}"


def shortened(text: str, chars: int) -> str:
    """Beginning and end of a text that is longer than `chars`; 0 leaves any text whole."""
    if chars == 0 or len(text) <= chars:
        return text
    return f"{text[: chars - chars // 2]} [... {len(text) - chars:,} characters ...] {text[-(chars // 2) :]}"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pager that is closed ends this quietly
    sys.exit(main())
