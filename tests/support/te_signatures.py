"""Signatures of TransformerEngine's callables, read from its sources without importing it, kept as data:

    python tests/support/te_signatures.py 2.9=FOLDER 2.10=FOLDER ...    (FOLDER holds transformer_engine/)

writes te_signatures.json: the releases, and by callable from which of them on it has which parameters (null:
it is not there).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_suffix(".json")
# What Megatron-Core calls of it on the path of this project; a class stands for its construction.
CALLABLES = (
    *(f"common.recipe.{kind}" for kind in ("DelayedScaling", "Float8CurrentScaling")),
    *(f"common.recipe.{kind}" for kind in ("Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling")),
    *(f"pytorch.{layer}" for layer in ("Linear", "LayerNormLinear", "GroupedLinear", "RMSNorm", "LayerNorm")),
    *(f"pytorch.{layer}.forward" for layer in ("Linear", "LayerNormLinear", "GroupedLinear")),
    "pytorch.DotProductAttention",
    "pytorch.DotProductAttention.forward",
    "pytorch.DotProductAttention.set_context_parallel_group",
    *("pytorch.Fp8Padding", "pytorch.Fp8Padding.forward"),
    *("pytorch.Fp8Unpadding", "pytorch.Fp8Unpadding.forward"),
    "pytorch.attention.rope.apply_rotary_pos_emb",
    *("pytorch.autocast", "pytorch.quantized_model_init"),
    *("pytorch.fp8.fp8_autocast", "pytorch.fp8.fp8_model_init"),
    *("pytorch.distributed.checkpoint", "pytorch.distributed.activation_recompute_forward"),
    *("pytorch.distributed.CudaRNGStatesTracker.add", "pytorch.distributed.CudaRNGStatesTracker.fork"),
    "pytorch.distributed.get_all_rng_states",
    *("pytorch.module.base.get_dummy_wgrad", "pytorch.module.base.get_workspace"),
    "pytorch.module.base.TransformerEngineBaseModule.set_tensor_parallel_group",
    "pytorch.module.base.TransformerEngineBaseModule.init_fp8_metadata",
    *("pytorch.optimizers.FusedAdam", "pytorch.optimizers.FusedAdam.step"),
    *("pytorch.optimizers.FusedAdam.initialize_state", "pytorch.optimizers.FusedSGD"),
    "pytorch.cpp_extensions.general_gemm",
    *("pytorch.router.fused_topk_with_score_function", "pytorch.router.fused_moe_aux_loss"),
    "pytorch.router.fused_compute_score_for_moe_aux_loss",
    *("pytorch.tensor.utils.replace_raw_data", "pytorch.tensor.utils.cast_master_weights_to_fp8"),
)
# Names in order; behind one "=" if it has a default, before it "*" or "**"; "*" alone: keywords alone follow.
Parameters = list[str]


class Sources:
    """One release, as a folder of Python files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trees: dict[Path, ast.Module] = {}

    def signature(self, name: str) -> Parameters | None:
        """Of a name of CALLABLES, wherever it is defined. None: it is nowhere."""
        module, parts = f"transformer_engine.{name}", []
        while self._file(module) is None:
            module, _, part = module.rpartition(".")
            parts.insert(0, part)
        found = self._definition(module, parts[0])
        if found is None:
            return None
        node, module = found
        if isinstance(node, ast.ClassDef):
            method = self._method(node, module, parts[1] if len(parts) > 1 else "__init__")
            return method[1:] if method and len(parts) == 1 else method
        return _spelt_tree(node.args)

    def _file(self, module: str) -> Path | None:
        path = self.folder.joinpath(*module.split("."))
        return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)

    def _definition(self, module: str, name: str) -> tuple[Any, str] | None:
        """Its class or function, and the module that has it: imports are followed."""
        file = self._file(module)
        if file is None:
            return None
        if file not in self.trees:
            self.trees[file] = ast.parse(file.read_text())
        for node in self.trees[file].body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return node, module
        for source, original in self._imports(module, file, name):
            if found := self._definition(source, original):
                return found
        return None

    def _imports(self, module: str, file: Path, name: str) -> Iterator[tuple[str, str]]:
        """Modules that the name may be imported from, and its name there."""
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node in self.trees[file].body:
            if not isinstance(node, ast.ImportFrom):
                continue
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                if alias.name == "*" or (alias.asname or alias.name) == name:
                    yield source, name if alias.name == "*" else alias.name

    def _method(self, node: ast.ClassDef, module: str, method: str) -> Parameters | None:
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == method:
                return _spelt_tree(part.args)
        if method == "__init__" and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            return ["self", *(ast.unparse(f.target) + ("=" if f.value else "") for f in fields)]
        for base in node.bases:
            found = self._definition(module, ast.unparse(base).rpartition(".")[2])
            if found and (parameters := self._method(*found, method)) is not None:
                return parameters
        return None


def _spelt_tree(args: ast.arguments) -> Parameters:
    plain = [*args.posonlyargs, *args.args]
    required = len(plain) - len(args.defaults)
    names = [arg.arg + ("=" if i >= required else "") for i, arg in enumerate(plain)]
    if args.vararg:
        names.append(f"*{args.vararg.arg}")
    elif args.kwonlyargs:
        names.append("*")
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        names.append(arg.arg + ("=" if default is not None else ""))
    return [*names, f"**{args.kwarg.arg}"] if args.kwarg else names


def imported(name: str) -> Parameters | None:
    """The same of the transformer_engine that this process imports."""
    value: Any = importlib.import_module("transformer_engine")
    for part in name.split("."):
        if not hasattr(value, part):
            try:
                importlib.import_module(f"{value.__name__}.{part}")
            except (ImportError, AttributeError):
                return None
        value = getattr(value, part)
    names: Parameters = []
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(name.startswith("*") for name in names):
            names.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        names.append(stars + parameter.name + ("=" if parameter.default is not parameter.empty else ""))
    return names


def by_release(releases: dict[str, Path]) -> dict[str, dict[str, Parameters | None]]:
    data: dict[str, dict[str, Parameters | None]] = {name: {} for name in CALLABLES}
    for release, folder in releases.items():
        sources = Sources(folder)
        for name, known in data.items():
            now = sources.signature(name)
            if not known or list(known.values())[-1] != now:
                known[release] = now
    return data


if __name__ == "__main__":
    given = {release: Path(folder) for release, _, folder in (a.partition("=") for a in sys.argv[1:])}
    lines = [f"{json.dumps(name)}: {json.dumps(changes)}" for name, changes in by_release(given).items()]
    callables = "{\n" + ",\n".join(lines) + "\n}"
    DATA.write_text(f'{{"releases": {json.dumps(list(given))},\n"callables": {callables}}}\n')
