"""`tools/bench.py` as a command line, inside the process of the test and in one of its own."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def bench(monkeypatch, capsys) -> Callable[..., dict[str, Any]]:
    """bench(*arguments) -> what `bench.py *arguments` prints, parsed."""
    monkeypatch.syspath_prepend(str(TOOLS))
    module = importlib.import_module("bench")

    def run(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
        module.main()
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def bench_process() -> Callable[..., dict[str, Any]]:
    """As `bench`, where a process group is started or memory is measured."""

    def run(*arguments: Any) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, str(TOOLS / "bench.py"), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": str(TOOLS.parent)},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
