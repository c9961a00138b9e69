"""Heavy imports stay home (DESIGN 4): who may import what, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_dapo"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# top-level module -> files or folders that may import it
HOMES = {
    "megatron": ("policy/", "bridge/", "checkpoint.py"),
    "vllm": ("bridge/vllm_plugin.py", "bridge/vllm_engine.py", "bridge/vllm_digest.py"),
    "wandb": ("report/",),
}
ALGO_MAY_IMPORT = {"torch", "megatron_dapo", *sys.stdlib_module_names}


def imported(source: str) -> set[str]:
    """Top-level names of everything imported anywhere in the source, in functions too; relative imports are ours."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("megatron_dapo" if node.level else (node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                names.add(name.value.split(".")[0])
    return names


def violations(file: str, source: str) -> set[str]:
    """Modules that `file` (a path inside the package) imports and may not."""
    names = imported(source)
    bad = {name for name, homes in HOMES.items() if name in names and not any(_is_in(file, home) for home in homes)}
    return bad | (names - ALGO_MAY_IMPORT if file.startswith("algo/") else set())


def _is_in(file: str, home: str) -> bool:
    return file.startswith(home) if home.endswith("/") else file == home


@pytest.mark.parametrize("file", FILES)
def test_heavy_imports_stay_home(file):
    assert violations(file, (PACKAGE / file).read_text()) == set()


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("trainer.py", "from megatron.core import parallel_state", {"megatron"}),
        ("trainer.py", "def f():\n    import megatron.core as m", {"megatron"}),
        ("trainer.py", "import importlib\nimportlib.import_module('megatron.core')", {"megatron"}),
        ("trainer.py", "import megatron_dapo.policy.step\nfrom . import layout", set()),
        ("policy/step.py", "from megatron.core import parallel_state", set()),
        ("policy.py", "import megatron", {"megatron"}),
        ("checkpoint.py", "import megatron.core, vllm", {"vllm"}),
        ("bridge/transfer.py", "import vllm", {"vllm"}),
        ("bridge/vllm_plugin.py", "import vllm, megatron", set()),
        ("rollout/engine.py", "from vllm.entrypoints import x", {"vllm"}),
        ("report/sinks.py", "import wandb", set()),
        ("trainer.py", "import wandb", {"wandb"}),
        ("algo/loss.py", "import math, torch.nn\nfrom megatron_dapo.types import Sample", set()),
        ("algo/loss.py", "import numpy", {"numpy"}),
    ],
)
def test_the_check_itself(file, source, expected):
    assert violations(file, source) == expected


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("megatron_dapo", {"torch", "megatron", "vllm", "transformers", "wandb"}),
        ("megatron_dapo.config", {"torch", "megatron", "vllm", "transformers", "wandb"}),
        ("megatron_dapo.data.prompts", {"megatron", "vllm", "transformers", "datasets"}),
        ("megatron_dapo.report.sinks", {"torch", "megatron", "vllm", "wandb"}),
    ],
)
def test_what_a_fresh_interpreter_loads(module, unwanted):
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert unwanted & set(result.stdout.split()) == set()
