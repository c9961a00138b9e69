"""Rows of the snapshots: a name of another package, the files of ours that use it, their calls, and what they
rely on of its signature, by version.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from signatures.reading import Parameter, Sources, as_parameters, as_text
from signatures.tables import FIELDS, FORWARDED, OBJECTS, RETURNS_SCHEDULE, SCHEDULES, TRANSFORMER_ENGINE
from signatures.uses import Use, call_text, find_uses, keys_made

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
PACKAGES = {"megatron-core": "megatron", "vllm": "vllm", "transformer-engine": "transformer_engine"}
SERVER, CALLS = ROOT / "megatron_dapo/rollout/server.py", ("client", "connection", "server_calls")
FRONTENDS = ("launchers", "common")  # where vLLM has had the options of its HTTP server
OVERRIDE = "override"

Row = dict[str, Any]


@cache
def snapshot(package: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{package.replace('-', '_')}.json").read_text())


@cache
def all_uses() -> dict[str, Use]:
    """Of all these packages, in the project's own sources."""
    files = [file for part in ("megatron_dapo", "tools", "dapo") for file in (ROOT / part).rglob("*.py")]
    uses = find_uses(ROOT, files, PACKAGES.values(), OBJECTS)
    for name, makers in FIELDS.items():
        for file, function in makers:
            uses[name].files.add(file)
            uses[name].calls.add(call_text(0, keys_made(ROOT / file, function), more=True))
    uses |= dict.fromkeys(SCHEDULES, uses.pop(RETURNS_SCHEDULE))
    return {name: use for name, use in uses.items() if not name.endswith("()")}  # what a call returned


def our_uses(package: str) -> dict[str, Use]:
    return {name: use for name, use in all_uses().items() if name.partition(".")[0] == PACKAGES[package]}


def transformer_engine_uses(megatron: Iterable[Sources]) -> dict[str, Use]:
    """What Megatron calls in TransformerEngine for us: of the names in TRANSFORMER_ENGINE."""
    uses: dict[str, Use] = {}
    for sources in megatron:
        files = [
            sources.root / "megatron/core" / file
            for file in sorted({file for entry in TRANSFORMER_ENGINE.values() for file in entry["through"]})
        ]
        found = find_uses(sources.root, [file for file in files if file.is_file()], ["transformer_engine"])
        for name, use in found.items():
            if name in TRANSFORMER_ENGINE:
                calls = {call for call in use.calls if not call.startswith(OVERRIDE)}
                uses.setdefault(name, Use(perhaps=False)).calls.update(calls)
    for name, use in uses.items():
        use.files.add(TRANSFORMER_ENGINE[name]["used_by"])
    return uses


def as_json(content: Mapping[str, Any]) -> str:
    """With a line for each row."""
    parts = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            parts.append(f" {json.dumps(key)}: {{\n{lines}\n }}")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def make_rows(
    package: str, versions: Mapping[str, Sources], *, megatron: Mapping[str, Sources]
) -> tuple[dict[str, Row], dict[str, list[str]]]:
    """The rows by name, and names that not every version has, with the versions."""
    if package == "transformer-engine":
        uses = transformer_engine_uses(megatron.values())
    else:
        uses = our_uses(package)
    rows: dict[str, Row] = {}
    absent: dict[str, list[str]] = {}
    for name, use in sorted(uses.items()):
        found = {version: signature(sources, name) for version, sources in versions.items()}
        if use.perhaps and not any(found.values()):
            continue  # a method that is ours alone
        signatures: dict[str, list[str]] = {}
        for version, text in found.items():
            if text is None:
                absent.setdefault(name, []).append(version)
            else:
                signatures.setdefault(relied_on(text, use.calls), []).append(version)
        rows[name] = {"used_by": sorted(use.files), "calls": sorted(use.calls), "signatures": signatures}
    return rows, absent


def signature(sources: Sources, name: str) -> str | None:
    """As Sources has it; of a constructor that is inherited or generated, the class's; of a function that
    hands its arguments on, that of where it does.
    """
    text = sources.signature(name)
    if text == "(*args, **kwargs)" and name in FORWARDED:
        return sources.signature(FORWARDED[name])
    if text is None and name.endswith(".__init__"):
        text = sources.signature(name.removesuffix(".__init__"))
    return text


def relied_on(text: str, calls: Iterable[str]) -> str:
    """What is left of a signature without optional parameters that no call gives. Of what is called by nobody
    here, that it can be called; of what a method of ours takes the place of, everything.
    """
    calls = list(calls)
    if not text.startswith("("):
        return text
    if not calls:
        return "callable"
    if any(call.startswith(OVERRIDE) for call in calls):
        return text
    parsed = [parsed_call(call) for call in calls]
    given = {name for _, names, _ in parsed for name in names}
    most = max(positional for positional, _, _ in parsed)
    kept = []
    for number, parameter in enumerate(as_parameters(text)):
        by_place = number < most and parameter.kind is not Parameter.KEYWORD_ONLY
        variable = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        required = parameter.default is Parameter.empty and not variable
        takes_rest = variable and (given - {p.name for p in as_parameters(text)} or by_place)
        if required or by_place or parameter.name in given or takes_rest:
            kept.append(parameter)
    return as_text(kept)


def parsed_call(call: str) -> tuple[int, list[str], bool]:
    """(by position, names, whether there is more) of uses.call_text."""
    parts = call.removeprefix(OVERRIDE).strip("()").split(", ")
    names = [part.removesuffix("=") for part in parts if part.endswith("=")]
    return parts.count("_"), names, "..." in parts


def refusal(text: str, call: str) -> str | None:
    """Why a signature does not take a call; None if it does."""
    if not text.startswith("(") or call.startswith(OVERRIDE):
        return None
    positional, names, more = parsed_call(call)
    bound = inspect.Signature(as_parameters(text))
    try:
        (bound.bind_partial if more else bound.bind)(*[0] * positional, **dict.fromkeys(names, 0))
    except TypeError as error:
        return str(error)
    return None


def drift(package: str, version: str, sources: Sources) -> list[str]:
    """What differs in this version of a package, a line for each name. Of a version that was not recorded,
    only what does not take our calls.
    """
    lines = []
    for name, row in snapshot(package)["rows"].items():
        text = signature(sources, name)
        [was] = [t for t, versions in row["signatures"].items() if version in versions] or [None]
        if version in snapshot(package)["versions"]:
            now = text if text is None else relied_on(text, row["calls"])
            changes = [] if now == was else [f"was {was}, and is {now or 'gone'}"]
        else:
            refusals = [refusal(text, call) for call in row["calls"]] if text else ["it is gone"]
            changes = [why for why in refusals if why]
        lines += [
            f"{name} of {package} {version} {what}; see {', '.join(row['used_by'])}" for what in changes
        ]
    return lines


def command_line_options() -> list[str]:
    return sorted(set(re.findall(r'"(--[a-z-]+)"', SERVER.read_text())))


def routes_called() -> list[str]:
    pattern = re.compile(r'(?:"(?:GET|POST)", f?|_timed_call\(f?|JSON_PATH = )"(/[a-z_/0-9]+)')
    texts = [(SERVER.parent / f"{name}.py").read_text() for name in CALLS]
    return sorted({route for text in texts for route in pattern.findall(text)})


def options_of(versions: Mapping[str, Sources]) -> dict[str, list[str]]:
    """By option of a server's command line, the versions that have it: it is a field of a dataclass."""
    classes = ["vllm.engine.arg_utils.EngineArgs"]
    classes += [f"vllm.entrypoints.{part}.cli_args.FrontendArgs" for part in FRONTENDS]
    fields = {
        version: {
            p.name for name in classes if (text := sources.signature(name)) for p in as_parameters(text)
        }
        for version, sources in versions.items()
    }
    return {
        option: [
            v
            for v in versions
            if option.removeprefix("--").removeprefix("no-").replace("-", "_") in fields[v]
        ]
        for option in command_line_options()
    }


def routes_of(versions: Mapping[str, Sources]) -> dict[str, list[str]]:
    """By path of the HTTP API that we call, the versions that have a route for it."""
    texts = {
        version: "".join(f.read_text() for f in sorted((sources.root / "vllm/entrypoints").rglob("*.py")))
        for version, sources in versions.items()
    }
    return {
        route: [v for v in versions if re.search(rf'(router\.\w+|Mount)\(\s*"{re.escape(route)}"', texts[v])]
        for route in routes_called()
    }
