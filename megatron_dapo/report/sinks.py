"""Where a run's numbers go: metrics.jsonl and facts.jsonl always; rollout files, a trace, TensorBoard and
wandb when asked for; and the console.

reporter = Reporter(config.run.dir, config, resume_step=None)
reporter.progress("collect", done=12, total=512, tokens_per_s=3812)
reporter.facts(step, collected, began=..., phases=[("rollout", 10.0, 55.5), ...], trained_tokens=...)
waited_s = reporter.rollouts(step, collected.groups, {"num_updates": 1})
reporter.record(step, {"loss": 0.01, "accuracy/mean": 0.4})
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.report.console import make_console
from megatron_dapo.report.engines import EngineLog, Phases, fleet_line
from megatron_dapo.report.facts import step_facts
from megatron_dapo.report.lines import JsonLines
from megatron_dapo.report.trace import Trace

if TYPE_CHECKING:
    from megatron_dapo.report.writer import RolloutWriter
    from megatron_dapo.types import Collected, Group

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


class Sink(Protocol):
    def record(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Reporter:
    """Owned by rank 0. `resume_step` is the first step that will be recorded after a resume; None for a new
    run. `progress`, `fleet` and `message` may be called from any thread, the others from one.
    """

    def __init__(
        self, run_dir: str | Path, config: RunConfig, resume_step: int | None, *, stream: TextIO | None = None
    ) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        options = config.report
        self._console = make_console(stream if stream is not None else sys.stdout)
        self._showing = threading.RLock()  # a signal handler's message may interrupt another one
        self._sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl", resume_step)]
        if options.tensorboard:
            self._sinks.append(TensorBoard(run_dir, resume_step))
        if options.wandb:
            self._sinks.append(Wandb(run_dir, config, resume_step))
        self._facts = JsonLines(run_dir / "facts.jsonl", resume_step)
        resumed = resume_step is not None
        self._trace = Trace(run_dir / "trace.json", resumed=resumed) if options.trace else None
        self._engines = EngineLog(keep_counters=options.trace)
        self._writer: RolloutWriter | None = None
        if options.rollouts:
            from megatron_dapo.report.writer import RolloutWriter  # loads torch and pyarrow

            self._writer = RolloutWriter(
                run_dir, keep=options.keep_rollouts, resume_step=resume_step, say=self.message
            )

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record a step once; ValueError when it is not beyond the last recorded one."""
        for sink in self._sinks:
            sink.record(step, metrics)
        with self._showing:
            self._console.close()
            self._console.line(step_line(step, metrics))

    def engine_metrics(self, phases: Phases) -> dict[str, float]:
        """`engines/*` of a step, from what `fleet` was told; before its `facts`. phases: (name, begin, end)
        in seconds of time.monotonic().
        """
        return self._engines.metrics(phases)

    def facts(
        self, step: int, collected: Collected, *, began: float, phases: Phases, trained_tokens: int
    ) -> None:
        """The step's line of facts.jsonl and its part of trace.json; once a step, before `record`. Seconds as
        in `engine_metrics`; trained_tokens: response tokens in the loss.
        """
        facts = step_facts(collected, began=began, phases=phases, trained_tokens=trained_tokens)
        self._facts.record(step, facts)
        if self._trace:
            self._trace.step(step, phases, collected.sampled, self._engines.counters())
        self._engines.forget(max((end for _, _, end in phases), default=began))

    def rollouts(self, step: int, groups: Sequence[Group], meta: Mapping[str, Any]) -> float:
        """Have the groups of a step written behind the run (report.rollouts); returns the seconds waited for
        the steps before it.
        """
        return self._writer.put(step, groups, dict(meta)) if self._writer else 0.0

    def flush(self) -> None:
        """Returns when the rollouts of all steps so far are on disk."""
        if self._writer:
            self._writer.flush()

    def fleet(self, states: Mapping[str, str], running: Mapping[str, int], waiting: int) -> None:
        """How the engines are now; call it several times a second. states: of every engine by its name;
        running: sequences by name; waiting: requests that no engine has taken.
        """
        self._engines.add(time.monotonic(), states, running, waiting)
        with self._showing:
            self._console.fleet(fleet_line(states, running, waiting))

    def progress(self, stage: str, done: int, total: int, **info: float | str) -> None:
        """Show how far a stage is. Cheap: call it for every group or micro-batch. `tokens_per_s=9` is shown
        as `9 tokens/s`.
        """
        with self._showing:
            self._console.progress(stage, done, total, info)

    def message(self, text: str) -> None:
        with self._showing:
            self._console.line(text)

    def close(self) -> None:
        """Returns when all rollouts are on disk."""
        if self._writer:
            self._writer.close()
        if self._trace:
            self._trace.close()
        self._facts.close()
        for sink in self._sinks:
            sink.close()
        with self._showing:
            self._console.close()


def step_line(step: int, metrics: Mapping[str, float]) -> str:
    parts = [shape.format(metrics[name]) for name, shape in SHOWN.items() if name in metrics]
    return " | ".join([f"step {step}", *parts])


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
