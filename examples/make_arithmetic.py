#!/usr/bin/env python3
"""Write small arithmetic problems as JSONL {prompt, answer}: train.jsonl and eval.jsonl, without a problem in common.

    python examples/make_arithmetic.py --out .cache/arithmetic

Made for SmolLM2-135M with three worked examples: mostly one-digit sums and differences, which it gets right some of the time, and some
two-digit ones, which it mostly gets wrong. The same arguments always write the same files.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from made_folder import make_folder, write_jsonl

VERSION = 1  # raise it when the files change, so that old caches are rebuilt

Problem = tuple[int, str, int]


def one_digit() -> list[Problem]:
    """Sums of two one-digit numbers and differences that are not negative: 155 problems."""
    return [(a, sign, b) for a in range(10) for b in range(10) for sign in "+-" if sign == "+" or a >= b]


def two_digit() -> list[Problem]:
    """The same with at least one two-digit number: 12,840 problems."""
    numbers = range(100)
    return [(a, s, b) for a in numbers for b in numbers for s in "+-" if max(a, b) > 9 and (s == "+" or a >= b)]


def split(seed: int, num_train: int, num_eval: int, easy: float) -> tuple[list[Problem], list[Problem]]:
    """Disjoint train and evaluation problems, of which the share `easy` is one-digit; train repeats those, for there are only 155."""
    rng = random.Random(f"arithmetic/{seed}")
    small, large = one_digit(), two_digit()
    rng.shuffle(small)
    rng.shuffle(large)
    num_small = round(num_eval * easy)
    if num_small > len(small) // 2:
        raise ValueError(f"--eval {num_eval} with --easy {easy} wants {num_small} of {len(small)} one-digit problems; lower --eval or --easy")
    held_out = small[:num_small] + large[: num_eval - num_small]
    small, large = small[num_small:], large[num_eval - num_small :]
    train = [rng.choice(small) if rng.random() < easy else rng.choice(large) for _ in range(num_train)]
    rng.shuffle(held_out)
    return train, held_out


def row(problem: Problem) -> dict[str, str]:
    a, sign, b = problem
    return {"prompt": f"What is {a} {sign} {b}?", "answer": str(a + b if sign == "+" else a - b)}
