#!/usr/bin/env python
"""Write docs/configuration.md from the fields of megatron_dapo/config/.

python tools/config_docs.py            write it
python tools/config_docs.py --check    exit 1 when it differs from what would be written
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_dapo.config import ObjectiveSection, RunConfig
from megatron_dapo.config.objective import KINDS

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

<!-- Made by tools/config_docs.py from megatron_dapo/config/; do not edit by hand. -->

A run is configured by a YAML file and `section.key=value` overrides, which win:

```
python -m megatron_dapo.train examples/configs/tiny.yaml optimizer.lr=1e-4 run.max_steps=20 --dry-run
```

Unknown keys are refused, with the nearest valid name; what does not go together, or does not suit the model
or the machine, is refused before anything starts (`megatron_dapo/preflight.py`). Nothing rewrites what you
wrote; the resolved configuration is saved as `config.yaml` in the run folder. `--dry-run` prints it, with the
layout and the processes a run would start.
"""


def section_types() -> dict[str, type[BaseModel]]:
    """The sections of RunConfig, in order; of the objective one for each kind."""
    sections: dict[str, type[BaseModel]] = {}
    for name, field in RunConfig.model_fields.items():
        if field.annotation is not ObjectiveSection:
            sections[name] = field.annotation  # type: ignore[assignment]
            continue
        for kind, section in KINDS.items():
            sections[name if len(KINDS) == 1 else f"{name} (kind={kind})"] = section
    return sections


def page(sections: Mapping[str, type[BaseModel]]) -> str:
    """The whole page, of the second and later kinds of objective what differs from the first. ValueError
    names every key that has no description.
    """
    silent = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, f in fields(section)
        if not f.description
    ]
    if silent:
        raise ValueError(
            f"no description for {', '.join(silent)}; add Field(description=...) in megatron_dapo/config/"
        )
    parts, first = [HEAD], {}
    for name, section in sections.items():
        rows = {
            key: f"| `{key}` | {_escape(type_text(f))} | {_escape(default_text(f))} | "
            f"{_escape(f.description or '')} |"
            for key, f in fields(section)
        }
        head = [f"\n## {name}\n"]
        if name.startswith("objective") and first:
            without = ", ".join(f"`{key}`" for key in first if key not in rows)
            head += [f"As the first kind{f', without {without}' if without else ''}, but:\n"]
            rows = {key: row for key, row in rows.items() if first.get(key) != row}
        elif name.startswith("objective"):
            first = rows
        head += ["| key | type | default | meaning |", "|---|---|---|---|"]
        parts.append("\n".join([*head, *rows.values(), ""]))
    return "".join(parts)


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Keys and fields in order; a key that is a section itself is followed by its own keys, as `key.part`."""
    for key, field in section.model_fields.items():
        yield prefix + key, field
        for kind in get_args(field.annotation) or (field.annotation,):
            if _is_section(kind):
                yield from fields(kind, f"{prefix}{key}.")


def _is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def type_text(field: FieldInfo) -> str:
    """The field's type with its bounds, e.g. `float > 0, <= 1 or null`."""
    return _name(field.annotation, field.metadata)


def default_text(field: FieldInfo) -> str:
    """As it would be written in YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{json.dumps(value) if not isinstance(value, float) else f'{value:g}'}`"


def _name(kind: Any, rules: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _name(arguments[0], [*arguments[1:], *rules])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_name(argument, () if argument is NoneType else rules) for argument in arguments)
    name = "null" if kind is NoneType else "section" if _is_section(kind) else (origin or kind).__name__
    if origin is not None:
        name += f"[{', '.join(_name(argument) for argument in arguments)}]"
    return " ".join(
        [name, ", ".join(f"{sign} {limit:g}" for rule in rules for sign, limit in _bounds(rule))]
    ).strip()


def _bounds(rule: Any) -> list[tuple[str, float]]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return [(sign, limit) for name, sign in signs.items() if (limit := getattr(rule, name, None)) is not None]


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    options = parser.parse_args(arguments)
    text = page(section_types())
    if not options.check:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
        return 0
    if options.out.is_file() and options.out.read_text() == text:
        return 0
    print(
        f"error: {options.out} does not match megatron_dapo/config/; run: python tools/config_docs.py",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
