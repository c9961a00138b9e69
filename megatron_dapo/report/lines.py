"""Files of one JSON object a line, one line a step: metrics.jsonl, facts.jsonl. A resumed run cuts them back
to where it goes on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dapo.errors import UserError


class JsonLines:
    """`{"step": 3, ...}` a line, steps strictly increasing, each on disk when `record` returns.

    `resume_step`: None for a new run, which renames another run's file in the same folder; otherwise lines
    from this step on, which runs again, are dropped.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._name, self._last = path.name, -math.inf
        if path.exists():
            if resume_step is None:
                path.rename(unused_name(path))
            else:
                self._last = _truncate(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a step. NaN and infinities become null: JSON has none. UserError when the step is not beyond
        the last one.
        """
        if step <= self._last:
            raise UserError(
                f"step {step} comes after step {self._last} in {self._name}; record every step once, in order"
            )
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
        self._file.flush()
        self._last = step

    def close(self) -> None:
        self._file.close()


def unused_name(path: Path) -> Path:
    """metrics.0.jsonl, metrics.1.jsonl ...: a new run in an old folder keeps the old run's numbers."""
    number = 0
    while (name := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return name


def _truncate(path: Path, resume_step: int) -> float:
    """Drop the steps that will be run again, and a last line that the kill cut short. Returns the last step
    kept.
    """
    last = -math.inf
    unfinished = path.with_name(path.name + ".tmp")
    with path.open("rb") as lines, unfinished.open("wb") as kept:
        for number, line in enumerate(lines, start=1):
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError) as error:
                if not lines.read(1):  # the last line
                    break
                raise UserError(
                    f"{path}, line {number} is not a step's ({error}); move the file away to resume"
                ) from error
            if step < resume_step:
                kept.write(line if line.endswith(b"\n") else line + b"\n")
                last = max(last, step)
    os.replace(unfinished, path)
    return last
