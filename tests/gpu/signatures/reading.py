"""Signatures of a package from its sources, without importing it: a wheel for another Python, or for a GPU,
answers as an installed package does.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Parameter = inspect.Parameter
MAX_STEPS = 20  # from where a name is imported to where it is defined


class Sources:
    """Of the packages that lie in `root`, as in site-packages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read = cache(self._parse)

    def signature(self, name: str) -> str | None:
        """Of a function, of a method without its first parameter, of a class's constructor, as
        "(model, num_tokens=..., *, group=...)"; "module"; "value" for anything else; None when there is no
        such name.
        """
        found = self._find(name)
        if found is None:
            return "module" if self._file(name.split(".")) else None
        module, node, is_member = found
        if isinstance(node, ast.Module):
            return "module"
        if isinstance(node, ast.ClassDef):
            return self._of_class(module, node)
        if isinstance(node, FUNCTIONS):
            decorators = {d.id for d in node.decorator_list if isinstance(d, ast.Name)}
            if "property" in decorators:
                return "value"
            bound = is_member and "staticmethod" not in decorators
            return as_text(list(parameters_of(node.args))[bound:])
        return "value"

    def _file(self, parts: list[str]) -> Path | None:
        path = self.root.joinpath(*parts)
        for file in (path / "__init__.py", path.with_name(path.name + ".py")):
            if file.is_file():
                return file
        return path if path.is_dir() else None  # a package without a file of its own

    def _parse(self, file: Path) -> ast.Module:
        return ast.parse(file.read_text() if file.is_file() else "")

    def _find(self, name: str, steps: int = 0) -> tuple[str, ast.AST, bool] | None:
        """(module, definition, whether it is a class's) of a dotted name."""
        parts = name.split(".")
        for size in range(len(parts) - 1, 0, -1):
            if file := self._file(parts[:size]):
                module = ".".join(parts[:size])
                found = self._in_module(module, file, parts[size], steps)
                for leaf in parts[size + 1 :]:
                    if found is None or not isinstance(found[1], ast.ClassDef):
                        return found  # an attribute of a value, which only running it would tell
                    found = self._member(found[0], found[1], leaf)
                return found
        return None

    def _in_module(self, module: str, file: Path, name: str, steps: int) -> tuple[str, ast.AST, bool] | None:
        assert steps < MAX_STEPS, f"{module}.{name} is imported in a circle"
        stars: list[str] = []
        found = last_definition(self._read(file).body, name)
        if isinstance(found, ast.ImportFrom):
            origin = self._absolute(module, file, found)
            imported = next(alias.name for alias in found.names if (alias.asname or alias.name) == name)
            if not self._file(origin.split(".")):
                return module, found, False  # of a package that is not here
            if (origin, imported) == (module, name):
                return self._module(f"{module}.{name}")
            return self._find(f"{origin}.{imported}", steps + 1) or self._module(f"{origin}.{imported}")
        if found is not None:
            return module, found, False
        for node in self._read(file).body:
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                stars.append(self._absolute(module, file, node))
        for origin in stars:
            if (there := self._find(f"{origin}.{name}", steps + 1)) is not None:
                return there
        if self._file([*module.split("."), name]):
            return self._module(f"{module}.{name}")
        lazy = last_definition(self._read(file).body, "__getattr__")
        return (module, lazy, False) if lazy and f'"{name}"' in ast.unparse(lazy).replace("'", '"') else None

    def _module(self, name: str) -> tuple[str, ast.AST, bool] | None:
        return (name, ast.Module([], []), False) if self._file(name.split(".")) else None

    def _absolute(self, module: str, file: Path, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        parts = parts[: len(parts) - (node.level - 1)]
        return ".".join([*parts, node.module] if node.module else parts)

    def _bases(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            found = self._find(f"{module}.{ast.unparse(base)}")
            if found and isinstance(found[1], ast.ClassDef):
                yield found[0], found[1]

    def _member(self, module: str, node: ast.ClassDef, name: str) -> tuple[str, ast.AST, bool] | None:
        if found := last_definition(node.body, name):
            return module, found, True
        if name in ("_fields", "__struct_fields__"):  # of every NamedTuple, and msgspec's Struct
            return (module, ast.Pass(), True) if self._fields(module, node) is not None else None
        for its_module, base in self._bases(module, node):
            if found := self._member(its_module, base, name):
                return found
        of_instances = any(
            isinstance(part, ast.Attribute)
            and isinstance(part.ctx, ast.Store)
            and part.attr == name
            and isinstance(part.value, ast.Name)
            and part.value.id == "self"
            for part in ast.walk(node)
        )
        return (module, ast.Pass(), True) if of_instances else None

    def _of_class(self, module: str, node: ast.ClassDef) -> str:
        fields = self._fields(module, node)
        if fields is not None and not last_definition(node.body, "__init__"):
            names = [p for p in fields.values() if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
            names += [p for p in fields.values() if p.kind is Parameter.KEYWORD_ONLY]
            return as_text(names + self._passed_over(module))
        made = self._member(module, node, "__init__") or self._member(module, node, "__new__")
        if made and isinstance(made[1], FUNCTIONS):
            return as_text(list(parameters_of(made[1].args))[1:])
        outside = len(list(self._bases(module, node))) < len(node.bases)
        return "(*args, **kwargs)" if outside else "()"

    def _passed_over(self, module: str) -> list[Parameter]:
        """pydantic's dataclasses pass over names that they do not know."""
        file = self._file(module.split("."))
        origin = last_definition(self._read(file).body, "dataclass") if file else None
        pydantic = isinstance(origin, ast.ImportFrom) and origin.module == "pydantic.dataclasses"
        return [Parameter("unknown", Parameter.VAR_KEYWORD)] if pydantic else []

    def _fields(self, module: str, node: ast.ClassDef) -> dict[str, Parameter] | None:
        """Of a dataclass or a struct, its bases' first; None for another class."""
        decorators = {ast.unparse(d).partition("(")[0].rpartition(".")[2] for d in node.decorator_list}
        bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        inherited = [self._fields(its_module, base) for its_module, base in self._bases(module, node)]
        declared = decorators & {"dataclass", "config"} or bases & {"Struct", "NamedTuple", "BaseModel"}
        if not declared and all(of_base is None for of_base in inherited):
            return None
        fields: dict[str, Parameter] = {}
        for of_base in reversed(inherited):
            fields |= of_base or {}
        kind = Parameter.POSITIONAL_OR_KEYWORD
        for item in node.body if declared or bases else []:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            annotation = ast.unparse(item.annotation)
            if annotation == "KW_ONLY":
                kind = Parameter.KEYWORD_ONLY
            elif "ClassVar" not in annotation and "init=False" not in ast.unparse(item):
                default = ... if _has_default(item.value) else Parameter.empty
                fields[item.target.id] = Parameter(item.target.id, kind, default=default)
        return fields


def _has_default(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in ("field", "Field"):
        named = {keyword.arg for keyword in value.keywords} & {"default", "default_factory"}
        return bool(named or value.args)
    return value is not None


def last_definition(body: list[ast.stmt], name: str) -> ast.AST | None:
    """What `name` is when these statements have run; of branches the first one that defines it."""
    found: ast.AST | None = None
    for node in body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name == name:
            found = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == name for target in targets for t in ast.walk(target)):
                found = node
        elif isinstance(node, ast.ImportFrom):
            if any((alias.asname or alias.name) == name for alias in node.names):
                found = node
        elif isinstance(node, ast.If | ast.Try):
            others = [*getattr(node, "handlers", []), node]
            branches = [node.body, *(other.body for other in others[:-1]), node.orelse]
            found = next((f for branch in branches if (f := last_definition(branch, name))), found)
    return found


def parameters_of(arguments: ast.arguments) -> Iterator[Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    without = len(positional) - len(arguments.defaults)
    for number, argument in enumerate(positional):
        only = number < len(arguments.posonlyargs)
        kind = Parameter.POSITIONAL_ONLY if only else Parameter.POSITIONAL_OR_KEYWORD
        yield Parameter(argument.arg, kind, default=Parameter.empty if number < without else ...)
    if arguments.vararg:
        yield Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield Parameter(
            argument.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else ...
        )
    if arguments.kwarg:
        yield Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD)


def as_text(parameters: list[Parameter]) -> str:
    """As Python writes them, with "..." for every default."""
    parts, star = [], False
    places = [parameter.kind is Parameter.POSITIONAL_ONLY for parameter in parameters]
    for number, parameter in enumerate(parameters):
        if parameter.kind is Parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        star = star or parameter.kind is Parameter.VAR_POSITIONAL
        prefix = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        suffix = "" if parameter.default is Parameter.empty else "=..."
        parts.append(f"{prefix}{parameter.name}{suffix}")
        if number + 1 == sum(places):
            parts.append("/")
    return f"({', '.join(parts)})"


def as_parameters(text: str) -> list[Parameter]:
    """The reverse."""
    tree = ast.parse(f"def f{text}: ...")
    assert isinstance(tree.body[0], ast.FunctionDef)
    return list(parameters_of(tree.body[0].args))
