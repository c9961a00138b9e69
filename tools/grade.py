"""Grade a JSONL file of responses with a verifier of the trainer, and compare with labels if there are any.

    python tools/grade.py FILE.jsonl --verifier dapo --response-key response --answer-key answer [--label-key
    label]

Prints one JSON object: rows, correct, timeouts, errors and, with labels, agreement (the share of rows where
the verifier and the label say the same). `--by source` adds the same per value of that key; `--disagreements
20` shows rows on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_dapo.reward.pool import Grade, GradingPool

BATCH_ROWS = 1024  # rows in flight: bounds memory, keeps every worker busy
LABELS = {True: True, False: False, -1: False}  # 1 and 0 equal True and False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    line: int
    response: str
    answer: str
    label: bool | None
    part: str | None


@dataclass(slots=True)
class Tally:
    rows: int = 0
    correct: int = 0
    timeouts: int = 0
    errors: int = 0
    agreed: int = 0
    labelled: bool = False

    def add(self, row: Row, grade: Grade) -> None:
        self.rows += 1
        self.correct += grade.correct is True
        self.timeouts += grade.outcome == "timeout"
        self.errors += grade.outcome == "error"
        self.agreed += (grade.correct is True) == row.label
        self.labelled = row.label is not None

    def summary(self) -> dict[str, float | int]:
        counts = {
            "rows": self.rows,
            "correct": self.correct,
            "timeouts": self.timeouts,
            "errors": self.errors,
        }
        return counts | ({"agreement": round(self.agreed / self.rows, 6)} if self.labelled else {})


def read_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The file's rows in order. ValueError names file, line and what is wrong with it."""
    with open(args.file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{args.file}, line {number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(values, dict):
                raise ValueError(f"{where}: must be a JSON object, is {line.strip()[:60]!r}")
            yield Row(
                line=number,
                response=_text(values, args.response_key, where, "--response-key"),
                answer=_text(values, args.answer_key, where, "--answer-key"),
                label=_label(values, args.label_key, where) if args.label_key else None,
                part=str(values.get(args.by)) if args.by else None,
            )


def _value(values: dict, key: str, where: str, option: str):
    if key not in values:
        raise ValueError(
            f"{where}: no key {key!r}; it has {', '.join(values) or 'none'} (choose with {option})"
        )
    return values[key]


def _text(values: dict, key: str, where: str, option: str) -> str:
    value = _value(values, key, where, option)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(
            f"{where}: {key}={value!r} must be text or a number; correct the row or choose with {option}"
        )
    return str(value)


def _label(values: dict, key: str, where: str) -> bool:
    value = _value(values, key, where, "--label-key")
    if not isinstance(value, bool | int | float) or value not in LABELS:
        raise ValueError(
            f"{where}: {key}={value!r} must be true, false, 1, 0 or -1; correct the row or choose with "
            f"--label-key"
        )
    return LABELS[value]


async def grade_file(args: argparse.Namespace, pool: GradingPool) -> dict:
    total, parts, shown = Tally(), {}, 0
    rows = read_rows(args)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        grades = await asyncio.gather(*(pool.grade([row.response], row.answer) for row in batch))
        for row, (grade,) in zip(batch, grades, strict=True):
            total.add(row, grade)
            if row.part is not None:
                parts.setdefault(row.part, Tally()).add(row, grade)
            if row.label is not None and row.label != (grade.correct is True) and shown < args.disagreements:
                shown += 1
                word = f"{grade.outcome} {grade.correct}, label {row.label}"
                print(
                    f"line {row.line}: {word}, answer {row.answer!r}, response ...{row.response[-100:]!r}",
                    file=sys.stderr,
                )
    if not total.rows:
        raise ValueError(f"{args.file} has no rows")
    by = {args.by: {name: parts[name].summary() for name in sorted(parts)}} if args.by else {}
    return total.summary() | by


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--verifier", default="dapo", help="dapo, math_verify or package.module:function")
    parser.add_argument("--response-key", default="response")
    parser.add_argument("--answer-key", default="answer")
    parser.add_argument("--label-key", help="true, false, 1, 0 or -1: what the grade should be")
    parser.add_argument("--by", metavar="KEY", help="also summarise per value of this key")
    parser.add_argument(
        "--disagreements", type=int, default=0, metavar="N", help="show the first N rows whose label differs"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="grading processes")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="seconds one grade may take")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    try:
        with GradingPool(args.verifier, args.workers, args.timeout_s) as pool:
            summary = asyncio.run(grade_file(args, pool))
    except (ValueError, OSError) as error:
        print(f"grade.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
