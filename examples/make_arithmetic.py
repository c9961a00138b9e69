#!/usr/bin/env python3
"""Write small arithmetic problems as JSONL {prompt, answer}: train.jsonl and eval.jsonl, without a problem in
common.

    python examples/make_arithmetic.py --out .cache/arithmetic

Made for SmolLM2-135M with three worked examples, at temperature 1: it gets most one-digit problems right most
of the time and two-digit ones some of the time, so that many groups are mixed. Half of the rows are
one-digit: nearly all that exist, which is why the files are small. The same arguments always write the same
files.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from made_folder import make_folder, write_jsonl

VERSION = 1  # raise it when the files change, so that old caches are rebuilt
NUM_TRAIN, NUM_EVAL = 240, 64  # half of each is one-digit

Problem = tuple[int, str, int]  # left, "+" or "-", right


def problems(low: int, high: int) -> list[Problem]:
    """Sums and non-negative differences of numbers from `low` up to `high`, which is excluded."""
    numbers = range(low, high)
    return [(a, sign, b) for a in numbers for b in numbers for sign in "+-" if sign == "+" or a >= b]


def split_problems(seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, evaluation): disjoint, without repeats, half one-digit and half from 10 to 49."""
    rng = random.Random(f"arithmetic/{seed}")
    train: list[Problem] = []
    held_out: list[Problem] = []
    for pool in (problems(0, 10), problems(10, 50)):
        rng.shuffle(pool)
        held_out += pool[: NUM_EVAL // 2]
        train += pool[NUM_EVAL // 2 : (NUM_EVAL + NUM_TRAIN) // 2]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def rows(problems: list[Problem]) -> list[dict[str, str]]:
    return [
        {"prompt": f"What is {a} {s} {b}?", "answer": str(a + b if s == "+" else a - b)}
        for a, s, b in problems
    ]


def build(folder: Path, seed: int) -> None:
    train, held_out = split_problems(seed)
    write_jsonl(folder / "train.jsonl", rows(train))
    write_jsonl(folder / "eval.jsonl", rows(held_out))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="folder to make; nothing happens if it was made with these arguments",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        make_folder(
            args.out,
            {"script": "make_arithmetic", "version": VERSION, "seed": args.seed},
            lambda f: build(f, args.seed),
        )
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
