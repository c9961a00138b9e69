#!/usr/bin/env python
"""Train the same tiny base with several objectives and say how they differ.

    python tools/compare_objectives.py --base .cache/tiny_base --out runs/compare --seeds 2 --steps 20

Every run has examples/configs/tiny.yaml, the same number of updates, one a step, and of sampled responses:
32 prompts x 8 in each step. dapo trains on those of the 32 groups that are informative (its dynamic sampling
looks for no others), dpo on the best and the worst response of each, grpo and ppo on all of them. A run that
has finished with these arguments is not made again. Prints a table and draws OUT/comparison.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
PROMPTS = 32  # sampled in each step
GOOD = 0.8  # held-out accuracy whose first update is reported
COMMON = (
    "sampling.max_age=0",
    f"sampling.prompts_per_step={PROMPTS}",
    f"sampling.max_prompts={PROMPTS}",
    "sampling.on_cap=train_smaller_batch",
    "batch.updates_per_step=1",
    "evaluation.every_steps=2",
    "checkpoint.export_hf=false",
    "report.rollouts=false",
)
# What each objective has beside its own defaults. A value model learns from nothing: it needs a larger step.
KINDS: dict[str, tuple[str, ...]] = {
    "ppo": ("sampling.dynamic=false", "objective.value_lr=2e-4", "objective.gae_lambda=1.0"),
    "dpo": ("sampling.dynamic=false",),
    "grpo": ("sampling.dynamic=false",),
    "dapo": ("sampling.dynamic=true",),
}
# What `--objectives all` adds: each, like grpo, trains on all groups.
OTHERS = (
    *("dr_grpo", "gspo", "cispo", "sapo", "gmpo", "dppo"),
    *("maxrl", "rloo", "reinforce_pp", "lite_ppo"),
)
COLOURS = {"ppo": "#8a6fb0", "dpo": "#4c9a6a", "grpo": "#2c6fbb", "dapo": "#c44e2c"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a finished run has measured. accuracies: held-out, by update. norms: of the gradient, by update.
    useless: share of groups whose responses are all correct or all wrong. clipped: share of the trained
    tokens at whose ratio the objective's clip acted; None where it has none.
    """

    accuracies: dict[int, float]
    norms: list[float]
    entropy: tuple[float, float]
    useless: float
    clipped: float | None
    tokens: int
    seconds: float

    @property
    def updates_to_good(self) -> float:
        """The first evaluated update with that accuracy; infinite where there is none."""
        return min((u for u, accuracy in self.accuracies.items() if accuracy >= GOOD), default=math.inf)


def read_run(folder: Path) -> Run:
    """ValueError when it has not recorded a step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    groups = [
        group["correct"]
        for line in (folder / "facts.jsonl").read_text().splitlines()
        for group in json.loads(line)["groups"]
    ]
    trained = [row for row in rows if "policy/loss" in row]
    if not trained:
        raise ValueError(f"{folder} has recorded no step; delete it to make the run again")
    updates, accuracies = 0, {}
    for row in rows:
        updates = int(row.get("update", updates))
        if "eval/accuracy" in row:
            accuracies[updates] = row["eval/accuracy"]
    clips = [row["policy/clip_low"] + row["policy/clip_high"] for row in trained if "policy/clip_low" in row]
    return Run(
        accuracies=accuracies,
        norms=[row["policy/grad_norm"] for row in trained],
        entropy=(trained[0]["policy/entropy"], trained[-1]["policy/entropy"]),
        useless=fmean(len(set(correct) - {None}) < 2 for correct in groups),
        clipped=fmean(clips) if clips else None,
        tokens=int(sum(row["tokens/generated"] for row in trained)),
        seconds=sum(row["time/step"] for row in trained),
    )


def recipe(out: Path) -> Path:
    """examples/configs/tiny.yaml without its objective, whose keys are dapo's."""
    config: Any = OmegaConf.load(ROOT / "examples" / "configs" / "tiny.yaml")
    del config["objective"]
    out.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, out / "tiny.yaml")
    return out / "tiny.yaml"


def train(kind: str, seed: int, options: argparse.Namespace) -> Path:
    """The folder of the run, which is made unless it has finished. SystemExit when it fails."""
    folder = options.out / f"{kind}-{seed}"
    base = options.base
    command = [sys.executable, "-m", "megatron_dapo.train", str(recipe(options.out))]
    command += [f"model.path={base}", f"data.path={base}/train.jsonl", f"evaluation.path={base}/eval.jsonl"]
    command += [
        *COMMON,
        f"objective.kind={kind}",
        *KINDS.get(kind, KINDS["grpo"]),
        f"run.max_steps={options.steps}",
    ]
    command += [f"run.seed={seed}", f"run.dir={folder}", *options.overrides]
    finished = folder / "finished.json"
    if finished.is_file() and json.loads(finished.read_text()) == command[1:]:
        return folder
    print(f"{kind}, seed {seed}: {folder}", file=sys.stderr, flush=True)
    for old in ("metrics.jsonl", "facts.jsonl"):
        (folder / old).unlink(missing_ok=True)
    if code := subprocess.run([*command, "checkpoint.resume=never"], stdout=sys.stderr).returncode:
        raise SystemExit(f"error: {kind} with seed {seed} ended with exit code {code}; its message is above")
    finished.write_text(json.dumps(command[1:]))
    return folder


def table(runs: Mapping[str, Sequence[Run]]) -> str:
    """Markdown, a row for each objective; means over its runs, and the least and the most of the accuracy."""
    lines = [
        "| objective | held-out accuracy | updates to 80 % | variance of the gradient norm "
        "| over its mean squared | entropy kept | useless groups | tokens clipped | tokens generated "
        "| seconds a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, of_kind in runs.items():
        ends = [list(run.accuracies.values())[-1] for run in of_kind]
        clipped = [run.clipped for run in of_kind if run.clipped is not None]
        reached = [run.updates_to_good for run in of_kind]
        cells = [
            kind,
            f"{fmean(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})",
            f"{fmean(reached):.1f}" if all(map(math.isfinite, reached)) else "not reached",
            f"{fmean(variance(run.norms) for run in of_kind):.3g}",
            f"{fmean(variance(run.norms) / fmean(run.norms) ** 2 for run in of_kind):.3g}",
            f"{fmean(run.entropy[1] / run.entropy[0] for run in of_kind):.0%}",
            f"{fmean(run.useless for run in of_kind):.0%}",
            f"{fmean(clipped):.1%}" if clipped else "-",
            f"{fmean(run.tokens for run in of_kind):,.0f}",
            f"{fmean(run.seconds / len(run.norms) for run in of_kind):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: Mapping[str, Sequence[Run]], out: Path) -> None:
    """Accuracy and gradient norm by update: a thin line for each run, the mean in bold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for kind, of_kind in runs.items():
        _draw(left, [run.accuracies for run in of_kind], kind)
        _draw(right, [dict(enumerate(run.norms, 1)) for run in of_kind], kind)
    left.set(xlabel="update", ylabel="held-out accuracy", ylim=(0, 1.02))
    right.set(xlabel="update", ylabel="gradient norm", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(loc="lower right")
    unfinished = out.with_name(f".{out.name}.tmp")
    figure.savefig(unfinished, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)
    os.replace(unfinished, out)


def _draw(axes: Any, curves: Sequence[Mapping[int, float]], kind: str) -> None:
    colour = COLOURS.get(kind, "#8a8a8a")
    for curve in curves:
        axes.plot(list(curve), list(curve.values()), color=colour, linewidth=0.8, alpha=0.5)
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    axes.plot(shared, [fmean(c[u] for c in curves) for u in shared], color=colour, linewidth=2, label=kind)


def objectives(text: str) -> list[str]:
    """Of a comma-separated list. ArgumentTypeError for one that there is not."""
    known = [*KINDS, *OTHERS]
    wanted = known if text == "all" else text.split(",")
    if unknown := [kind for kind in wanted if kind not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} must be one of {', '.join(known)}, or all")
    return wanted


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="folder that make_tiny_base.py has made")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each objective")
    parser.add_argument("--steps", type=int, default=20, help="steps, and so updates, of each run")
    parser.add_argument(
        "--objectives", type=objectives, default=[*KINDS], metavar="KIND,...|all", help=",".join(KINDS)
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.seeds < 1 or options.steps < 2:
        parser.error("--seeds must be at least 1 and --steps at least 2")
    folders = {
        kind: [train(kind, seed, options) for seed in range(options.seeds)] for kind in options.objectives
    }
    runs = {kind: [read_run(folder) for folder in of_kind] for kind, of_kind in folders.items()}
    draw(runs, options.out / "comparison.png")
    print(table(runs))
    print(options.out / "comparison.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
