#!/usr/bin/env python
"""Draw a run's learning curve: held-out accuracy, accuracy while sampling and mean reward, by step.

    python tools/plot.py runs/tiny_dapo [--out docs/tiny_dapo.png]

Reads RUN/metrics.jsonl; without --out the picture is RUN/learning_curve.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# metric -> label, colour, marker; accuracies are drawn on the left axis, the reward on the right one
ACCURACIES = {
    "eval/accuracy": ("held-out accuracy (eval/accuracy)", "#c44e2c", "o"),
    "accuracy/mean": ("accuracy of sampled groups (accuracy/mean)", "#2c6fbb", ""),
}
REWARD = {"reward/mean": ("reward of trained groups (reward/mean, right)", "#8a8a8a", "")}
Curve = tuple[list[int], list[float]]


def read_curves(file: Path) -> dict[str, Curve]:
    """Steps and values of every plotted metric, sorted by step. ValueError for a missing, broken or empty
    file.
    """
    if not file.is_file():
        raise ValueError(f"no {file}; give the folder of a run that has recorded a step")
    points: dict[str, dict[int, float]] = {name: {} for name in {**ACCURACIES, **REWARD}}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file}, line {number}: not a JSON object with a step: {line[:80]!r}"
            ) from error
        for name, values in points.items():
            if isinstance(row.get(name), int | float):
                values[step] = row[name]
    curves = {
        name: (sorted(values), [values[step] for step in sorted(values)])
        for name, values in points.items()
        if values
    }
    if not curves:
        raise ValueError(f"{file} holds none of {', '.join(points)}")
    return curves


def draw(curves: Mapping[str, Curve], title: str, out: Path) -> None:
    """Write the PNG, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    lines = _draw(left, curves, ACCURACIES)
    left.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02), title=title)
    left.grid(alpha=0.3)
    if REWARD.keys() & curves.keys():
        right = left.twinx()
        lines += _draw(right, curves, REWARD)
        right.set(ylabel="reward")
        left.set_zorder(right.get_zorder() + 1)
        left.patch.set_visible(False)
    left.legend(handles=lines, loc="lower right", fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.tmp")
    figure.savefig(unfinished, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)
    os.replace(unfinished, out)


def _draw(axes: Any, curves: Mapping[str, Curve], styles: Mapping[str, tuple[str, str, str]]) -> list[Any]:
    return [
        axes.plot(*curves[name], label=label, color=colour, marker=marker, linewidth=1.6)[0]
        for name, (label, colour, marker) in styles.items()
        if name in curves
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, help="PNG file to write")
    parser.add_argument("--title", help="default: the folder's name")
    options = parser.parse_args(arguments)
    out = options.out or options.run / "learning_curve.png"
    if out.suffix != ".png":
        parser.error(f"--out {out} must end in .png")
    try:
        curves = read_curves(options.run / "metrics.jsonl")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(curves, options.title or options.run.resolve().name, out)
    for name, (steps, values) in curves.items():
        print(f"{name}: {values[0]:.3f} at step {steps[0]}, {values[-1]:.3f} at step {steps[-1]}")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
