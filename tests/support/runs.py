"""Whole runs as users start them: `python -m megatron_dapo.train` on a tiny random model, in a process group
of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

TESTS = Path(__file__).parents[1]
STEPS = 5  # of the undisturbed run that the others are compared with
# request_failures says that there was a disturbance, which is what nothing else may say
NOT_COMPARED = ("time/", "memory/", "eval/", "engines/", "sampling/request_failures")
MARK = "MEGATRON_DAPO_TEST_RUN"  # in the environment of a run and of everything it starts
VERIFIERS = """
import json, os, time
from pathlib import Path


def third(response, answer):
    # Random weights are right for a third of the samples, so most groups are mixed and some are all wrong.
    hold()
    return sum(map(ord, response)) % 3 == 0


def hold():
    # DAPO_TEST_HOLD="RUN_DIR STEP": once that step is recorded, wait in the next one until RUN_DIR/release
    # exists.
    if "DAPO_TEST_HOLD" not in os.environ:
        return
    folder, step = os.environ["DAPO_TEST_HOLD"].rsplit(" ", 1)
    metrics = Path(folder, "metrics.jsonl")
    lines = metrics.read_text().split(chr(10))[:-1] if metrics.exists() else []
    if not lines or json.loads(lines[-1])["step"] < int(step):
        return
    Path(folder, "held").touch()
    while not Path(folder, "release").exists():
        time.sleep(0.02)
"""


def write_data(folder: Path, rows: int = 64) -> Path:
    """`rows` problems of different lengths, and the module of the verifier, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dapo_test_verifiers.py").write_text(VERIFIERS)
    path = folder / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i}+{i * i}=", "answer": str(i + i * i)}) + "\n" for i in range(rows))
    )
    return path


def settings(model: Path, data: Path, run_dir: Path, **values: Any) -> dict[str, Any]:
    """The configuration of a tiny run. Dots in keys are written as double underscores."""
    defaults = {
        "model.path": model,
        "model.dtype": "fp32",
        "layout.data_parallel": 2,
        "rollout.max_tokens": 8,
        "rollout.max_concurrency": 64,
        "sampling.prompts_per_step": 4,
        "sampling.samples_per_prompt": 4,
        "rollout.seeded": True,
        "reward.verifier": "dapo_test_verifiers:third",
        "reward.timeout_s": 300,
        "optimizer.lr": 0.003,
        "batch.max_tokens": 256,
        "data.path": data,
        "data.max_prompt_tokens": 16,
        "run.dir": run_dir,
        "run.max_steps": 3,
    }
    chosen = defaults | {name.replace("__", "."): value for name, value in values.items()}
    return {name: value for name, value in chosen.items() if value is not None}


def overrides(model: Path, data: Path, run_dir: Path, **values: Any) -> list[str]:
    """The same as a command line."""
    return [f"{name}={value}" for name, value in settings(model, data, run_dir, **values).items()]


def environment(data: Path, mark: str, **extra: str) -> dict[str, str]:
    paths = [str(data.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    # A suite that runs under torchrun variables or a CI's would not be the plain start that is tested here.
    kept = {
        name: value for name, value in os.environ.items() if name not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    }
    return kept | {"PYTHONPATH": os.pathsep.join(paths), MARK: mark} | extra


class Run:
    """A started run: its processes are found by a mark in their environment, whoever their parent is by
    then.
    """

    def __init__(
        self, arguments: list[str], data: Path, log: Path, module: str = "megatron_dapo.train", **extra: str
    ) -> None:
        self.log, self.mark = log, f"{log}-{time.time_ns()}"
        command = [sys.executable, "-m", module, *arguments] if module else [sys.executable, *arguments]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(data, self.mark, **extra),
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout_s: float = 600) -> int:
        return self.process.wait(timeout_s)

    def processes(self) -> list[psutil.Process]:
        """All living processes of this run, zombies not counted."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def named(self, part: str) -> list[psutil.Process]:
        """The processes whose command line holds `part`. vLLM renames its workers, so those only by
        `VLLM::`.
        """
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if part in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def until(self, condition: Callable[[], Any], timeout_s: float = 400) -> Any:
        """Poll until `condition()` holds and return it; fails with the log when the run ends or time is
        up.
        """
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert self.process.poll() is None, (
                f"the run ended with {self.process.returncode}:\n{self.text[-3000:]}"
            )
            assert time.monotonic() < deadline, f"not within {timeout_s} s:\n{self.text[-3000:]}"
            time.sleep(0.02)
        return value

    def all_gone(self, timeout_s: float = 30) -> bool:
        """Whether every process of the run ends within the time, without help."""
        deadline = time.monotonic() + timeout_s
        while left := self.processes():
            if time.monotonic() > deadline:
                print("left over:", [(p.pid, p.cmdline()[:6]) for p in left])
                return False
            time.sleep(0.1)
        return True

    def kill(self) -> None:
        """kill -9 of every process."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def started(arguments: list[str], data: Path, log: Path, **options: Any) -> Iterator[Run]:
    run = Run(arguments, data, log, **options)
    try:
        yield run
    finally:
        run.kill()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def compared(line: dict) -> dict:
    return {name: value for name, value in line.items() if not name.startswith(NOT_COMPARED)}


def assert_steps_equal(run_dir: Path, finished: SimpleNamespace, steps: range) -> None:
    """Bit for bit, sampled tokens included."""
    mine = {line["step"]: line for line in metrics(run_dir)}
    reference = {line["step"]: line for line in finished.metrics}
    for step in steps:
        assert compared(mine[step]) == compared(reference[step]), f"step {step}"
        name = f"rollouts/step_{step:06d}.parquet"
        assert groups(run_dir / name) == groups(finished.run_dir / name), f"rollouts of step {step}"


def groups(path: Path) -> list:
    from megatron_dapo.report.rollouts import load_groups

    return load_groups(path)[0]


def resume(place: SimpleNamespace, run_dir: Path, log: str, **values) -> Run:
    values = {"run__max_steps": STEPS, "checkpoint__every_steps": 1, "checkpoint__keep": STEPS} | values
    env = {"DAPO_TEST_HOLD": values.pop("hold")} if "hold" in values else {}
    return started(
        overrides(place.model, place.data, run_dir, **values), place.data, place.folder / log, **env
    )
