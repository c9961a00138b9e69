"""The stand-in for TransformerEngine takes the calls that the real package takes, release by release."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from support.standin import environment
from support.te_signatures import CALLABLES, DATA, Parameters

TESTS = Path(__file__).parents[1]
RECORDED = json.loads(DATA.read_text())
RELEASES = RECORDED["releases"]
OWN = "2.9"  # the release whose signatures the stand-in has
# Megatron-Core routes experts by torch's product where these are not as in 2.9.
GONE = {"pytorch.module.base.get_workspace", "pytorch.cpp_extensions.general_gemm"}


def recorded(name: str, release: str) -> Parameters | None:
    """Of a callable in a release: what was recorded for it or, without a change, for one before it."""
    changes = RECORDED["callables"][name]
    past = RELEASES[: RELEASES.index(release) + 1]
    return changes[max((r for r in changes if r in past), key=past.index)]


def signatures() -> dict[str, Parameters | None]:
    """Of the transformer_engine that a new process imports."""
    code = "import json, te_signatures as s; print(json.dumps({n: s.imported(n) for n in s.CALLABLES}))"
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(TESTS / "support")]))
    command, env = [sys.executable, "-W", "ignore", "-c", code], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def drift(ours: Parameters, theirs: Parameters | None) -> list[str]:
    """Why a call that `ours` takes may fail with `theirs`."""
    if theirs is None:
        return ["it is gone"]
    own, other = (_by_name(parameters) for parameters in (ours, theirs))
    found = []
    for name, (keyword_only, default) in own.items():
        if name not in other:
            found += [] if theirs[-1].startswith("**") else [f"{name} is gone"]
        elif other[name][0] and not keyword_only:
            found.append(f"{name} is a keyword alone")
        elif default and not other[name][1]:
            found.append(f"{name} has no default")
    found += [f"{name} is new and has no default" for name in other.keys() - own.keys() if not other[name][1]]
    if [name for name in other if name in own] != [name for name in own if name in other]:
        found.append("the order has changed")
    return found


def _by_name(parameters: Parameters) -> dict[str, tuple[bool, bool]]:
    """Whether each is a keyword alone, and whether it has a default."""
    star = next((i for i, p in enumerate(parameters) if p.startswith("*")), len(parameters))
    names = {p.rstrip("="): (i > star, p.endswith("=")) for i, p in enumerate(parameters)}
    return {name: value for name, value in names.items() if not name.startswith("*")}


def test_the_stand_in_has_the_signatures_of_its_release():
    with environment():
        found = signatures()
    for name in CALLABLES:
        assert found[name] == recorded(name, OWN), f"{name} of the stand-in is not as in {OWN}"


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_takes_the_calls_that_the_stand_in_takes(release):
    changes = {name: drift(recorded(name, OWN) or [], recorded(name, release)) for name in CALLABLES}
    drifted = {name: reasons for name, reasons in changes.items() if reasons}
    assert drifted.keys() == (GONE if release != OWN else set()), drifted


@pytest.mark.skipif(not importlib.util.find_spec("transformer_engine"), reason="needs TransformerEngine")
def test_the_installed_package_takes_the_calls_that_the_stand_in_takes():
    version, found = importlib.metadata.version("transformer-engine"), signatures()
    for name in set(CALLABLES) - GONE:
        reasons = drift(recorded(name, OWN) or [], found[name])
        assert not reasons, f"{name} in TransformerEngine {version}: {', '.join(reasons)}"


def test_a_drift_is_told_by_parameter():
    ours = ["x", "bias=", "*", "name="]
    assert drift(ours, ["x", "bias=", "new=", "*", "name="]) == []
    assert drift(ours, ["x", "**kwargs"]) == []
    assert drift(ours, None) == ["it is gone"]
    assert drift(ours, ["x", "*", "name="]) == ["bias is gone"]
    assert drift(ours, ["x", "bias", "*", "name="]) == ["bias has no default"]
    assert drift(ours, ["x", "new", "bias=", "*", "name="]) == ["new is new and has no default"]
    assert drift(ours, ["x", "*", "bias=", "name="]) == ["bias is a keyword alone"]
    assert drift(ours, ["bias=", "x=", "*", "name="]) == ["the order has changed"]


def test_nobody_finds_the_stand_in_who_does_not_look_for_it():
    elsewhere = [str(TESTS.parent), str(TESTS), str(TESTS / "support")]  # of ranks and of pytest
    assert PathFinder.find_spec("transformer_engine", elsewhere) is None
    with environment():
        first = os.environ["PYTHONPATH"].split(os.pathsep)[0]
    assert PathFinder.find_spec("transformer_engine", [first]) is not None
