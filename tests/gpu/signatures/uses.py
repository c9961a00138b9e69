"""Which names of other packages some sources use, and how they call them, read from their syntax trees.

A name is what is imported (`megatron.core.optimizer.OptimizerConfig`) and attributes of it
(`megatron.core.parallel_state.get_data_parallel_rank`); of a class that the sources derive from, also the
methods that they call or override. What an object of another package is, a syntax tree does not say: a table
of `objects` tells, file by file, which of its attributes and names stand for which method.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Use:
    """files: that name it. calls: in the form of `call_text`; none where it is only named. perhaps: it is a
    method of a class that ours derives from, if that class has it.
    """

    files: set[str] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)
    perhaps: bool = True


def call_text(positional: int, keywords: Iterable[str], *, more: bool = False) -> str:
    """Two by position and one by name as "(_, _, name=)"; with "..." at the end where the source does not say
    what else there is (`*arguments`, `**fields`).
    """
    parts = ["_"] * positional + [f"{name}=" for name in sorted(keywords)] + ["..."] * more
    return f"({', '.join(parts)})"


def find_uses(
    root: Path,
    paths: Iterable[Path],
    packages: Iterable[str],
    objects: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Use]:
    """By name, in files that are named relative to `root`. ValueError for what `objects` names in vain."""
    found: dict[str, Use] = {}
    missed = dict(objects or {})
    for path in sorted(paths):
        file = str(path.relative_to(root))
        reader = _Reader(file, tuple(packages), missed.pop(file, {}), found)
        tree = ast.parse(path.read_text())
        reader.read_imports(tree)
        reader.visit(tree)
        if reader.unseen:
            missed[file] = {name: reader.objects[name] for name in reader.unseen}
    if missed:
        raise ValueError(f"these files use no longer what is said of them: {missed}")
    return found


def keys_made(path: Path, function: str) -> set[str]:
    """Names of the fields that a function returns as `dict(name=...)` or `{"name": ...}`."""
    [node] = [n for n in ast.walk(ast.parse(path.read_text())) if getattr(n, "name", None) == function]
    keys = {
        k.value
        for n in ast.walk(node)
        if isinstance(n, ast.Dict)
        for k in n.keys
        if isinstance(k, ast.Constant)
    }
    for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id == "dict":
            keys |= {keyword.arg for keyword in call.keywords if keyword.arg}
    return {str(key) for key in keys}


class _Reader(ast.NodeVisitor):
    def __init__(
        self, file: str, packages: tuple[str, ...], objects: Mapping[str, str], found: dict[str, Use]
    ) -> None:
        self.file, self.packages, self.objects, self.found = file, packages, objects, found
        self.unseen = set(objects)
        self.names: dict[str, str] = {}  # what a local name stands for

    def read_imports(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.partition(".")[0]
                    if first in self.packages:
                        self.names[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                for alias in node.names:
                    if node.module.partition(".")[0] in self.packages:
                        self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                        self._use(f"{node.module}.{alias.name}")

    def _use(self, name: str, call: str | None = None, *, perhaps: bool = False) -> None:
        use = self.found.setdefault(name, Use())
        use.perhaps = use.perhaps and perhaps
        use.files.add(self.file)
        if call is not None:
            use.calls.add(call)

    def _resolved(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.names[node.id]
        if isinstance(node, ast.Attribute) and (owner := self._resolved(node.value)):
            return f"{owner}.{node.attr}"
        return self._of_object(node)

    def _of_object(self, node: ast.expr) -> str | None:
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        self.unseen.discard(name)
        return self.objects.get(name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if name := self._resolved(node):
            self._use(name)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if name := self._resolved(node.func):
            self._use(name, _text(node))
        elif isinstance(node.func, ast.Call) and (name := self._resolved(node.func.func)):
            self._use(f"{name}()", _text(node))  # what it returns is called
        if len(node.args) > 1 and (owner := self._resolved(node.args[0])):
            second = node.args[1]  # getattr(owner, "name"), mock.patch.object(owner, "name")
            if isinstance(second, ast.Constant) and str(second.value).isidentifier():
                self._use(f"{owner}.{second.value}")
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        own = {item.name: item for item in node.body if isinstance(item, FUNCTIONS)}
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
        for base in filter(None, map(self._resolved, bases)):
            for name, method in own.items():
                if name != "__init__":
                    self._use(f"{base}.{name}", _overriding(method), perhaps=True)
            for call in (item for item in ast.walk(node) if isinstance(item, ast.Call)):
                if not isinstance(call.func, ast.Attribute):
                    continue
                name, owner = call.func.attr, call.func.value
                if _is_super(owner):
                    self._use(f"{base}.{name}", _text(call))
                elif isinstance(owner, ast.Name) and owner.id == "self" and name not in own:
                    self._use(f"{base}.{name}", _text(call), perhaps=True)
        self.generic_visit(node)


def _overriding(method: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """That a method of ours takes the place of one: "override(_, _)", all of whose parameters matter."""
    given = method.args
    more = given.vararg is not None or given.kwarg is not None
    named = [argument.arg for argument in given.kwonlyargs]
    return "override" + call_text(len(given.posonlyargs + given.args) - 1, named, more=more)


def _text(node: ast.Call) -> str:
    stars = any(isinstance(argument, ast.Starred) for argument in node.args)
    names = [keyword.arg for keyword in node.keywords if keyword.arg]
    more = stars or len(names) < len(node.keywords)
    return call_text(sum(not isinstance(a, ast.Starred) for a in node.args), names, more=more)


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
