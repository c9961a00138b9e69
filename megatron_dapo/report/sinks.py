"""Where a run's numbers go: metrics.jsonl always, TensorBoard and wandb when asked for, and the console.

reporter = Reporter(config.run.dir, config, resume_step=None)
reporter.progress("collect", done=12, total=512, tokens_per_s=3812)
reporter.record(step, {"loss": 0.01, "accuracy/mean": 0.4})
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError

# metric -> how the console's line of a step shows it; those that are absent are left out
SHOWN = {
    "accuracy/mean": "accuracy {:.3f}",
    "reward/mean": "reward {:+.3f}",
    "eval/accuracy": "eval {:.3f}",
    "policy/loss": "loss {:+.4g}",
    "policy/grad_norm": "grad norm {:.4g}",
    "response/length_mean": "length {:.1f}",
    "time/step": "{:.1f} s",
}
TERMINAL_PERIOD_S = 0.1
PLAIN_PERIOD_S = 30.0


class Sink(Protocol):
    def record(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Reporter:
    """Owned by rank 0. `resume_step` is the first step that will be recorded after a resume; None for a new
    run.
    """

    def __init__(
        self, run_dir: str | Path, config: RunConfig, resume_step: int | None, *, stream: TextIO | None = None
    ) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        out: TextIO = stream if stream is not None else sys.stdout
        self._console = Terminal(out) if out.isatty() else Plain(out)
        self._jsonl = JsonLines(run_dir / "metrics.jsonl", resume_step)
        self._sinks: list[Sink] = [self._jsonl]
        if config.report.tensorboard:
            self._sinks.append(TensorBoard(run_dir, resume_step))
        if config.report.wandb:
            self._sinks.append(Wandb(run_dir, config, resume_step))

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record a step once; ValueError when it is not beyond the last recorded one."""
        for sink in self._sinks:
            sink.record(step, metrics)
        self._console.close()
        self._console.line(step_line(step, metrics))

    def progress(self, stage: str, done: int, total: int, **info: float | str) -> None:
        """Show how far a stage is. Cheap: call it for every group or micro-batch. `tokens_per_s=9` is shown
        as `9 tokens/s`.
        """
        self._console.progress(stage, done, total, info)

    def message(self, text: str) -> None:
        self._console.line(text)

    def close(self) -> None:
        self._console.close()
        for sink in self._sinks:
            sink.close()


def step_line(step: int, metrics: Mapping[str, float]) -> str:
    parts = [shape.format(metrics[name]) for name, shape in SHOWN.items() if name in metrics]
    return " | ".join([f"step {step}", *parts])


class JsonLines:
    """One JSON object a line, `{"step": 3, ...}`, steps strictly increasing. NaN and infinities become null:
    JSON has none.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._last = -math.inf
        if path.exists():
            if resume_step is None:
                path.rename(_unused_name(path))
            else:
                self._last = _truncate(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        if step <= self._last:
            raise UserError(
                f"step {step} comes after step {self._last} in metrics.jsonl; record every step once, in "
                f"order"
            )
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        self._last = step

    def close(self) -> None:
        self._file.close()


def _unused_name(path: Path) -> Path:
    """metrics.0.jsonl, metrics.1.jsonl ...: a new run in an old folder keeps the old run's numbers."""
    number = 0
    while (name := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return name


def _truncate(path: Path, resume_step: int) -> float:
    """Drop the steps that will be run again, and a last line that the kill cut short. Returns the last step
    kept.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    kept: list[bytes] = []
    last = -math.inf
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number} is not a step's metrics ({error}); move the file away to resume"
            ) from error
        if step < resume_step:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
            last = max(last, step)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(b"".join(kept))
    os.replace(unfinished, path)
    return last


class TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "report.tensorboard=true needs `pip install tensorboard`; install it or set it to false"
            ) from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A resumed run continues the same wandb run. `step` is a metric of its own: wandb's counter refuses to
    go back.
    """

    def __init__(self, run_dir: Path, config: RunConfig, resume_step: int | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "report.wandb=true needs `pip install wandb`; install it or set it to false"
            ) from error
        id_file = run_dir / "wandb_id"
        if resume_step is None or not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        online = bool(os.environ.get("WANDB_API_KEY"))
        self._run = wandb.init(
            project=config.report.wandb_project,
            name=run_dir.resolve().name,
            id=id_file.read_text().strip(),
            resume="allow" if online else None,
            mode=None if online else "offline",  # None: WANDB_MODE decides
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
        )
        self._run.define_metric("*", step_metric="step")

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


def _describe(info: Mapping[str, float | str]) -> str:
    """`3,812 tokens/s, 0.41 pass rate` of {"tokens_per_s": 3812, "pass_rate": 0.41}."""
    return ", ".join(
        f"{_short(value)} {name.replace('_per_', '/').replace('_', ' ')}" for name, value in info.items()
    )


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


class Terminal:
    """A live line for the running stage, and finished lines above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False)
        self._live: Any = None
        self._shown = ("", -math.inf)  # (stage, when)

    def progress(self, stage: str, done: int, total: int, info: Mapping[str, float | str]) -> None:
        now = time.monotonic()
        if self._shown[0] == stage and now - self._shown[1] < TERMINAL_PERIOD_S and done < total:
            return
        if self._shown[0] != stage:
            self._stop()
            self._live = self._start(stage)
        self._shown = (stage, now)
        self._live.update(self._live.task_ids[0], completed=done, total=total, info=_describe(info))

    def _start(self, stage: str) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[info]}"),
        )
        live = Progress(*columns, console=self._console, transient=True, refresh_per_second=4)
        live.add_task(stage, total=None, info="")
        live.start()
        return live

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._stop()
        self._shown = ("", -math.inf)


class Plain:
    """Lines for files and pipes: a stage reports every PLAIN_PERIOD_S, so a quick one is silent."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage, self._shown_s = "", 0.0

    def progress(self, stage: str, done: int, total: int, info: Mapping[str, float | str]) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._shown_s = stage, now
        if now - self._shown_s >= PLAIN_PERIOD_S:
            self._shown_s = now
            self.line(f"{stage} {done}/{total}" + (f" ({_describe(info)})" if info else ""))

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._stage = ""
