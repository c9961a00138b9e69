"""docs/first-gpu-hour.md says of every function that has something for a GPU alone how it is tried: the rows
of its table are those functions, and what they name is there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/first-gpu-hour.md"
# Pretends for Megatron that the CPU were a GPU; and plans for machines that are not there.
LEFT_OUT = ("policy/cpu.py", "planning/", "config/")
WORD = re.compile(r"nccl|gpu|(cuda|CUDA_)\S*")  # of strings
NAMES = {"is_cuda", "cuda", "is_cpu", "_on_cpu"}  # of attributes


def gpu_functions(file: str, text: str) -> Iterator[str]:
    """What names CUDA, NCCL or a GPU, as file:function; as "file:" what stands outside of functions."""

    def walk(node: ast.AST, where: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inside = f"{where}.{child.name}" if where else child.name
                if isinstance(child, ast.FunctionDef) and "gpu" in child.name.split("_"):
                    yield f"{file}:{inside}"
                yield from walk(child, inside)
                continue
            word = isinstance(child, ast.Constant) and WORD.fullmatch(str(child.value))
            name = isinstance(child, ast.Attribute) and child.attr in NAMES
            if word or name:
                yield f"{file}:{where}"
            yield from walk(child, where)

    yield from walk(ast.parse(text), "")


def found() -> set[str]:
    functions = set()
    for path in (ROOT / "megatron_dapo").rglob("*.py"):
        name = str(path.relative_to(ROOT / "megatron_dapo"))
        if not name.startswith(LEFT_OUT):
            functions |= set(gpu_functions(name, path.read_text()))
    return functions


def rows() -> dict[str, str]:
    """By function what the table says of it."""
    lines = DOCUMENT.read_text().splitlines()
    cells = [line.strip("|").split("|") for line in lines if re.match(r"\| `\S+\.py:", line)]
    return {
        function.strip(): " | ".join(rest)
        for names, *rest in cells
        for function in re.findall(r"`([^`]+)`", names)
    }


def test_the_table_has_every_function():
    assert sorted(rows()) == sorted(found())


def test_what_the_table_names_is_there():
    """Files of tests, and checks of the first hour."""
    text = DOCUMENT.read_text()
    for name in re.findall(r"`(tests/\S+?\.py)`", text):
        assert (ROOT / name).is_file(), name
    for function, told in rows().items():
        assert "tests/" in told or "`" in told, f"{function}: neither a test nor a check"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f():\n    torch.cuda.synchronize()", ["x.py:f"]),
        ("class A:\n    def f(self): return self.t.is_cuda", ["x.py:A.f"]),
        ("device = 'cuda'", ["x.py:"]),
        ("def check_gpu(): ...", ["x.py:check_gpu"]),
        ("def f():\n    'of cuda'\n    return call('cudaFree')", ["x.py:f"]),
        ("def f(): return 'cpu', gpus", []),
    ],
)
def test_functions_are_found(text, expected):
    assert list(gpu_functions("x.py", text)) == expected


if __name__ == "__main__":
    print(*sorted(found()), sep="\n")
