"""Who may import whom (DESIGN 4), as data, read from the syntax trees: floors, wings, purity, heavy modules.

Imports inside functions count; imports for type checkers alone do not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_dapo"

# Files and folders by floor. A file imports from floors below its own, or from its own without a cycle.
FLOORS = {
    5: ("__init__.py", "api.py", "train.py", "serve.py"),
    4: (
        "trainer.py",
        "controller.py",
        "colocation.py",
        "checkpoint.py",
        "checkpoint_writer.py",
        "preflight.py",
        "disk.py",
        "evaluate.py",
        "planning/",
    ),
    3: ("data/", "reward/", "rollout/", "policy/", "sync/", "report/", "convert/"),
    2: ("objectives/", "batching/", "weights/"),
    1: (
        "types.py",
        "metrics.py",
        "layout.py",
        "model_spec.py",
        "errors.py",
        "environment.py",
        "lifeline.py",
        "pulse.py",
        "rendezvous.py",
        "config/",
    ),
}
WINGS = FLOORS[3]  # which do not import each other

# These import torch and the standard library at most, and each other.
PURE = (
    "types.py",
    "metrics.py",
    "layout.py",
    "model_spec.py",
    "errors.py",
    "environment.py",
    "lifeline.py",
    "pulse.py",
    "objectives/",
    "batching/",
    "weights/block_fp8.py",
    "weights/names.py",
    "weights/slices.py",
    "sync/plan.py",
    "sync/plan_report.py",
    "sync/regions.py",
    "sync/sink_checks.py",
    "sync/sinks.py",
    "sync/sources.py",
)
PURE_MAY_IMPORT = {"torch", *sys.stdlib_module_names}

# top-level module -> the files and folders that may import it
HOMES = {
    "megatron": ("policy/", "sync/", "checkpoint.py", "checkpoint_writer.py"),
    "vllm": ("sync/vllm/", "rollout/route.py"),  # what runs inside vLLM's processes
    "wandb": ("report/",),
    "modelopt": ("convert/",),
}
NOT_MEGATRON = ("policy/rules.py", "policy/fp8_rules.py")  # preflight reads them before any rank is there

IMPORTERS = ("import_module", "__import__")  # functions that import by name

Sources = Mapping[str, str]  # path inside the package -> text


def read_package() -> dict[str, str]:
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def is_in(file: str, places: tuple[str, ...]) -> bool:
    return any(file.startswith(place) if place.endswith("/") else file == place for place in places)


def floor_of(file: str) -> int:
    """LookupError for a file that is on no floor."""
    for floor, places in FLOORS.items():
        if is_in(file, places):
            return floor
    raise LookupError(f"{file} is on no floor; add it to FLOORS, and to DESIGN section 4")


def imported_names(file: str, source: str) -> set[str]:
    """Dotted names of everything that is imported at run time: `from a.b import c` gives a.b.c."""
    names: set[str] = set()
    folder = ["megatron_dapo", *file.split("/")[:-1]]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            children: list[ast.AST] = list(node.orelse)
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IMPORTERS:
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                names.add(name.value)
        for child in children:
            visit(child)

    visit(ast.parse(source))
    return names


def imported_files(file: str, sources: Sources) -> set[str]:
    """Files of the package that `file` imports: the module named, or the one that defines the name."""
    files = set()
    for name in imported_names(file, sources[file]):
        top, *parts = name.split(".")
        if top != "megatron_dapo":
            continue
        for end in (len(parts), len(parts) - 1):
            path = "/".join(parts[: max(end, 0)])
            match = {f"{path}.py", f"{path}/__init__.py".removeprefix("/")} & set(sources)
            if match:
                files |= match
                break
    return files - {file}


def climbing(sources: Sources) -> set[tuple[str, str]]:
    """(file, what it imports from a floor above, or from another wing)."""
    bad = set()
    for file in sources:
        for other in imported_files(file, sources):
            wing, other_wing = (next((w for w in WINGS if is_in(f, (w,))), None) for f in (file, other))
            if floor_of(other) > floor_of(file) or (wing and other_wing and wing != other_wing):
                bad.add((file, other))
    return bad


def cycles(sources: Sources) -> list[list[str]]:
    """Groups of files that import each other, directly or around (strongly connected components)."""
    graph = {file: imported_files(file, sources) for file in sources}
    reachable: dict[str, set[str]] = {}
    for file in graph:
        seen: set[str] = set()
        todo = list(graph[file])
        while todo:
            if (other := todo.pop()) not in seen:
                seen.add(other)
                todo += graph[other]
        reachable[file] = seen
    groups = {
        frozenset({f, *(o for o in reachable[f] if f in reachable[o])}) for f in graph if f in reachable[f]
    }
    return sorted(sorted(group) for group in groups)


def impure(sources: Sources) -> set[tuple[str, str]]:
    """(pure file, what it imports and may not)."""
    bad = set()
    for file in sources:
        if not is_in(file, PURE):
            continue
        bad |= {(file, other) for other in imported_files(file, sources) if not is_in(other, PURE)}
        tops = {name.split(".")[0] for name in imported_names(file, sources[file])} - {"megatron_dapo"}
        bad |= {(file, name) for name in tops - PURE_MAY_IMPORT}
    return bad


def far_from_home(sources: Sources) -> set[tuple[str, str]]:
    """(file, heavy module that it imports and may not)."""
    bad = set()
    for file, source in sources.items():
        for top in {name.split(".")[0] for name in imported_names(file, source)} & set(HOMES):
            if not is_in(file, HOMES[top]) or (top == "megatron" and file in NOT_MEGATRON):
                bad.add((file, top))
    return bad


# --- the package ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package() -> Sources:
    return read_package()


def test_every_file_has_a_floor(package):
    assert min(floor_of(file) for file in package) == 1


def test_no_import_climbs_and_no_wing_knows_another(package):
    assert climbing(package) == set()


def test_no_files_import_each_other_in_a_circle(package):
    assert cycles(package) == []


def test_pure_files_import_torch_and_the_standard_library_at_most(package):
    assert impure(package) == set()


def test_heavy_imports_stay_home(package):
    assert far_from_home(package) == set()


# --- the checks see what they are for ---------------------------------------------------


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch.nn as nn", {"torch.nn"}),
        ("def f():\n    import megatron.core", {"megatron.core"}),
        ("from megatron_dapo.policy import step", {"megatron_dapo.policy.step"}),
        ("from . import pool", {"megatron_dapo.reward.pool"}),
        ("from ..types import Group", {"megatron_dapo.types.Group"}),
        ("import importlib\nimportlib.import_module('vllm.x')", {"importlib", "vllm.x"}),
        ("__import__('wandb')", {"wandb"}),
        ("if TYPE_CHECKING:\n    import numpy\nelse:\n    import math", {"math"}),
        ("if not TYPE_CHECKING:\n    import numpy", {"numpy"}),
        ("try:\n    import a\nexcept ImportError:\n    import b", {"a", "b"}),
    ],
)
def test_what_an_import_is(source, names):
    assert imported_names("reward/math.py", source) == names


LEAF = {
    "__init__.py": "",
    "types.py": "",
    "errors.py": "",
    "rollout/client.py": "",
    "rollout/__init__.py": "",
    "trainer.py": "",
}


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("policy/step.py", "import megatron_dapo.trainer", "trainer.py"),  # up
        (
            "batching/packing.py",
            "def f():\n    from megatron_dapo.rollout import client",
            "rollout/client.py",
        ),  # up
        (
            "policy/step.py",
            "from megatron_dapo.rollout.client import EngineClient",
            "rollout/client.py",
        ),  # aside
        ("policy/step.py", "from megatron_dapo.types import Batch", None),
        ("rollout/fleet.py", "from megatron_dapo.rollout.client import EngineClient", None),
        ("checkpoint.py", "from megatron_dapo.rollout.client import EngineClient", None),
        ("checkpoint.py", "from megatron_dapo import RunConfig", "__init__.py"),  # up
        ("evaluate.py", "import megatron_dapo.trainer", None),  # the same floor
    ],
)
def test_an_import_that_climbs_is_seen(file, source, expected):
    bad = climbing({**LEAF, file: source})
    assert bad == ({(file, expected)} if expected else set())


def test_a_file_on_no_floor_is_seen():
    with pytest.raises(LookupError, match=r"utils\.py is on no floor"):
        floor_of("utils.py")


def test_a_circle_is_seen_however_long_and_wherever_its_imports_stand():
    a, b, c = "rollout/a.py", "rollout/b.py", "rollout/c.py"
    to = "from megatron_dapo.rollout.{} import x".format
    assert cycles({a: to("b"), b: to("c"), c: "def f():\n    " + to("a")}) == [[a, b, c]]
    assert cycles({a: to("b"), b: "from . import a", c: to("a")}) == [[a, b]]
    assert cycles({a: to("b"), b: "if TYPE_CHECKING:\n    " + to("a")}) == []
    assert cycles({"config/__init__.py": "from megatron_dapo.config.a import A", "config/a.py": ""}) == []
    package, part = "config/__init__.py", "config/a.py"
    assert cycles(
        {package: to("a").replace("rollout", "config"), part: "from megatron_dapo.config import B"}
    ) == [[package, part]]


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("objectives/dapo.py", "import math, torch.nn\nfrom megatron_dapo.types import Sample", set()),
        ("objectives/dapo.py", "import numpy", {"numpy"}),
        ("objectives/dapo.py", "if TYPE_CHECKING:\n    import numpy", set()),
        ("layout.py", "from megatron_dapo.config import RunConfig", {"config/__init__.py"}),
        ("weights/slices.py", "from megatron_dapo.weights.hf import CheckpointReader", {"weights/hf.py"}),
        ("weights/hf.py", "import safetensors", set()),
    ],
)
def test_an_impure_import_is_seen(file, source, expected):
    others = {"types.py": "", "config/__init__.py": "", "weights/hf.py": ""}
    assert impure({**others, file: source}) == {(file, name) for name in expected}


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("trainer.py", "from megatron.core import parallel_state", {"megatron"}),
        ("trainer.py", "import importlib\nimportlib.import_module('megatron.core')", {"megatron"}),
        ("trainer.py", "import megatron_dapo.policy.step\nfrom . import layout", set()),
        ("policy/step.py", "from megatron.core import parallel_state", set()),
        ("policy/rules.py", "from megatron.core import parallel_state", {"megatron"}),
        ("checkpoint.py", "import megatron.core, vllm", {"vllm"}),
        ("sync/exchange.py", "import vllm", {"vllm"}),
        ("sync/vllm/plugin.py", "import vllm, megatron", set()),
        ("rollout/client.py", "from vllm.entrypoints import x", {"vllm"}),
        ("rollout/route.py", "from vllm.entrypoints import x", set()),
        ("report/sinks.py", "import wandb", set()),
        ("trainer.py", "import wandb", {"wandb"}),
    ],
)
def test_a_heavy_import_away_from_home_is_seen(file, source, expected):
    assert far_from_home({file: source}) == {(file, name) for name in expected}


# --- what a fresh interpreter loads -----------------------------------------------------


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("megatron_dapo", {"torch", "megatron", "vllm", "transformers", "wandb"}),
        ("megatron_dapo.config", {"torch", "megatron", "vllm", "transformers", "wandb"}),
        ("megatron_dapo.environment", {"torch", "megatron", "vllm", "transformers", "wandb"}),
        ("megatron_dapo.preflight", {"megatron", "vllm", "transformers", "wandb"}),
        ("megatron_dapo.train", {"megatron", "vllm", "transformers", "wandb"}),
        ("megatron_dapo.data.prompts", {"megatron", "vllm", "transformers", "datasets"}),
        ("megatron_dapo.report.sinks", {"torch", "megatron", "vllm", "wandb"}),
        ("megatron_dapo.sync.vllm.plugin", {"megatron", "vllm", "transformers", "wandb"}),
        ("megatron_dapo.rollout.middleware", {"torch", "megatron", "vllm", "transformers", "wandb"}),
    ],
)
def test_what_a_fresh_interpreter_loads(module, unwanted):
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert unwanted & set(result.stdout.split()) == set()
