"""`tools/bench.py` as a command line, inside the process of the test."""

from __future__ import annotations

import importlib
import json
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
