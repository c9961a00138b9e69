"""Grade the responses of a JSONL file with a rule of the trainer, and compare with labels if there are any.

    python tools/grade.py --input rows.jsonl --output graded.jsonl --rule auto [--timeout 5]
    python tools/grade.py --input rows.jsonl --rule dapo --label-key label --by source

A row has an answer and a `response`, or in its place a `prediction`, the final answer alone. The output has
the rows in their order with `correct` (null: no grade), `score`, `outcome` and `extracted`. A run that was
killed goes on where its output ends.

Prints one JSON object: rows, the number of each outcome and, with labels, agreement (the share of rows where
rule and label say the same), false_positives and false_negatives. `--by source` adds the same per value of
that key; `--disagreements 20` shows rows on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megatron_dapo.reward.jobs import OUTCOMES, Grade
from megatron_dapo.reward.pool import GradingPool

BATCH_ROWS = 1024  # rows in flight: bounds memory, keeps every worker busy
LABELS = {True: True, False: False, -1: False}  # 1 and 0 equal True and False
ADDED = ("correct", "score", "outcome", "extracted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """values: the row as the file has it. response: the text that is graded."""

    line: int
    values: dict[str, Any]
    response: str
    answer: str
    rule: str | None
    label: bool | None
    part: str | None

    def seen(self) -> dict[str, Any]:
        """What rules see: the row, its answer under that name, as in training."""
        return self.values | {"answer": self.answer}


@dataclass(slots=True)
class Tally:
    outcomes: Counter[str] = field(default_factory=Counter)
    false_positives: int = 0
    false_negatives: int = 0
    labelled: bool = False

    def add(self, row: Row, outcome: str) -> None:
        self.outcomes[outcome] += 1
        if row.label is not None:
            correct = outcome == "correct"
            self.false_positives += correct and not row.label
            self.false_negatives += row.label and not correct
            self.labelled = True

    def summary(self) -> dict[str, Any]:
        rows = self.outcomes.total()
        counts: dict[str, Any] = {"rows": rows} | {name: self.outcomes[name] for name in OUTCOMES}
        if not self.labelled:
            return counts
        wrong = {"false_positives": self.false_positives, "false_negatives": self.false_negatives}
        return counts | {"agreement": round(1 - sum(wrong.values()) / rows, 6)} | wrong


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line that is not empty. ValueError names file, line and what is wrong."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(values, dict):
                raise ValueError(f"{where}: must be a JSON object, is {line.strip()[:60]!r}")
            yield number, values


def read_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The file's rows in order. ValueError names file, line and what is wrong with it."""
    for number, values in read_lines(args.input):
        where = f"{args.input}, line {number}"
        rule = values.get(args.rule_key) if args.rule_key else None
        yield Row(
            line=number,
            values=values,
            response=_response(values, args.response_key, where),
            answer=_text(values, args.answer_key, where, "--answer-key"),
            rule=None if rule is None else str(rule),
            label=_label(values, args.label_key, where) if args.label_key else None,
            part=str(values.get(args.by)) if args.by else None,
        )


def _response(values: dict[str, Any], key: str, where: str) -> str:
    if key in values or "prediction" not in values:
        return _text(values, key, where, "--response-key")
    return as_response(_text(values, "prediction", where, "--response-key"))


def as_response(prediction: str) -> str:
    """A response that ends with this final answer, in the form that each rule looks for."""
    line = " ".join(prediction.split("\n"))
    return f"Answer: {line}" if "\\boxed" in line else f"Answer: {line}\n\\boxed{{{line}}}"


def _value(values: dict[str, Any], key: str, where: str, option: str) -> Any:
    if key not in values:
        raise ValueError(
            f"{where}: no key {key!r}; it has {', '.join(values) or 'none'} (choose with {option})"
        )
    return values[key]


def _text(values: dict[str, Any], key: str, where: str, option: str) -> str:
    value = _value(values, key, where, option)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(
            f"{where}: {key}={value!r} must be text or a number; correct the row or choose with {option}"
        )
    return str(value)


def _label(values: dict[str, Any], key: str, where: str) -> bool:
    value = _value(values, key, where, "--label-key")
    if not isinstance(value, bool | int | float) or value not in LABELS:
        raise ValueError(
            f"{where}: {key}={value!r} must be true, false, 1, 0 or -1; correct the row or choose with "
            f"--label-key"
        )
    return LABELS[value]


def read_graded(path: Path) -> list[dict[str, Any]]:
    """What a run that was killed has graded; a line that it did not finish is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return [values for _, values in read_lines(path)]


class Report:
    """Counts the grades as they come, in all and by part, and shows what disagrees with its label."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._by, self._left_to_show = args.by, args.disagreements
        self._total, self._parts = Tally(), {}

    def add(self, row: Row, outcome: str) -> None:
        self._total.add(row, outcome)
        if row.part is not None:
            self._parts.setdefault(row.part, Tally()).add(row, outcome)
        if row.label is not None and row.label != (outcome == "correct") and self._left_to_show > 0:
            self._left_to_show -= 1
            print(
                f"line {row.line}: {outcome}, label {row.label}, answer {row.answer!r}, response "
                f"...{row.response[-100:]!r}",
                file=sys.stderr,
            )

    def summary(self) -> dict[str, Any]:
        parts = {name: self._parts[name].summary() for name in sorted(self._parts)}
        return self._total.summary() | ({self._by: parts} if self._by else {})


def _take_over(rows: Iterator[Row], graded: list[dict[str, Any]], path: Path, report: Report) -> None:
    """Count what the output has already. ValueError if it is not of these rows."""
    for number, done in enumerate(graded, start=1):
        row = next(rows, None)
        mine = {key: value for key, value in done.items() if key not in ADDED}
        theirs = {key: value for key, value in row.values.items() if key not in ADDED} if row else None
        if row is None or mine != theirs or done.get("outcome") not in OUTCOMES:
            raise ValueError(
                f"{path}, line {number} is not the grade of that row of the input; delete the file"
            )
        report.add(row, done["outcome"])


async def grade_file(args: argparse.Namespace, pool: GradingPool, bar: Any) -> dict[str, Any]:
    rows, report = read_rows(args), Report(args)
    graded = read_graded(args.output) if args.output else []
    _take_over(rows, graded, args.output, report)
    bar.update(len(graded))
    with open(args.output or os.devnull, "a", encoding="utf-8") as output:
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            calls = (pool.grade([r.response], r.answer, rule=r.rule, row=r.seen) for r in batch)
            for row, (grade,) in zip(batch, await asyncio.gather(*calls), strict=True):
                report.add(row, grade.outcome)
                _write(output, row, grade)
            output.flush()
            bar.update(len(batch))
    summary = report.summary()
    if not summary["rows"]:
        raise ValueError(f"{args.input} has no rows")
    return summary


def _write(output: TextIO, row: Row, grade: Grade) -> None:
    score = None if grade.correct is None else grade.score
    added = dict(zip(ADDED, (grade.correct, score, grade.outcome, grade.extracted), strict=True))
    output.write(json.dumps(row.values | added) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, metavar="ROWS.jsonl")
    parser.add_argument("--output", type=Path, metavar="GRADED.jsonl", help="without it only the summary")
    parser.add_argument("--rule", default="auto", help="as reward.verifier (docs/rewards.md)")
    parser.add_argument("--rule-key", help="key of a row that names its rule, as data.rule_key")
    parser.add_argument("--response-key", default="response")
    parser.add_argument("--answer-key", default="answer")
    parser.add_argument("--label-key", help="true, false, 1, 0 or -1: what the grade should be")
    parser.add_argument("--by", metavar="KEY", help="also summarise per value of this key")
    parser.add_argument(
        "--disagreements", type=int, default=0, metavar="N", help="show the first N rows whose label differs"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="grading processes")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds one grade may take")
    return parser.parse_args(argv)


def main() -> int:
    from tqdm import tqdm

    args = parse_args()
    try:
        with open(args.input, "rb") as lines:
            total = sum(1 for line in lines if line.strip())
        with (
            GradingPool(args.rule, args.workers, args.timeout) as pool,
            tqdm(total=total, unit="rows", disable=None) as bar,  # on a terminal alone
        ):
            summary = asyncio.run(grade_file(args, pool, bar))
    except (ValueError, OSError) as error:
        print(f"grade.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
