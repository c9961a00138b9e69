"""The console of a run: a live line on a terminal, rare plain lines in a file or pipe."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TextIO

TERMINAL_PERIOD_S = 0.1
PLAIN_PERIOD_S = 30.0


class Console(Protocol):
    """What shows a run's progress and sentences."""

    def progress(self, stage: str, done: int, total: int, info: Mapping[str, float | str]) -> None: ...

    def fleet(self, text: str) -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None: ...


def make_console(stream: TextIO) -> Console:
    """A live line where the stream is a terminal."""
    return Terminal(stream) if stream.isatty() else Plain(stream)


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
    """A live line for the running stage with the fleet's state below it, and finished lines above."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console as RichConsole

        self._console = RichConsole(file=stream, highlight=False)
        self._live: Any = None
        self._fleet = ""
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

    def fleet(self, text: str) -> None:
        self._fleet = text  # shown with the next refresh

    def _start(self, stage: str) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.text import Text

        terminal = self

        class Live(Progress):
            def get_renderables(self) -> Iterable[Any]:
                yield from super().get_renderables()
                if terminal._fleet:
                    yield Text(terminal._fleet, no_wrap=True, overflow="ellipsis")

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[info]}"),
        )
        live = Live(*columns, console=self._console, transient=True, refresh_per_second=4)
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
        self._stage, self._fleet, self._shown_s = "", "", 0.0
        self._latest: tuple[int, int, Mapping[str, float | str]] = (0, 0, {})  # of the stage

    def progress(self, stage: str, done: int, total: int, info: Mapping[str, float | str]) -> None:
        if stage != self._stage:
            self._stage, self._shown_s = stage, time.monotonic()
        self._latest = (done, total, info)
        if self._due():
            self._show()

    def fleet(self, text: str) -> None:
        self._fleet = text
        done, total, _ = self._latest
        if self._stage and done < total and self._due():
            self._show()

    def _due(self) -> bool:
        return time.monotonic() - self._shown_s >= PLAIN_PERIOD_S

    def _show(self) -> None:
        self._shown_s = time.monotonic()
        done, total, info = self._latest
        state = f"{self._stage} {done}/{total}" + (f" ({_describe(info)})" if info else "")
        self.line(f"{state} | {self._fleet}" if self._fleet else state)

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._stage = ""
