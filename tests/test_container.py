"""The Dockerfiles say what can be checked without building them, and the engines' Python in the GPU image."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ["Dockerfile", "Dockerfile.cpu"]


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest of it) in order, without comments; a line that ends in a backslash goes on."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in whole if line.strip()]


def read(name: str) -> list[tuple[str, str]]:
    return instructions((ROOT / name).read_text())


def of(kind: str, name: str) -> list[str]:
    return [rest for found, rest in read(name) if found == kind]


def copied(name: str) -> list[str]:
    """What is copied from the project."""
    words = [[word for word in rest.split() if not word.startswith("--")] for rest in of("COPY", name)]
    return [source for sources in words for source in sources[:-1]]


def undeclared(found: list[tuple[str, str]]) -> set[str]:
    """Variables in braces that nothing before declares."""
    declared: set[str] = set()
    wrong: set[str] = set()
    for kind, rest in found:
        wrong |= set(re.findall(r"\$\{(\w+)", rest)) - declared
        if kind in ("ARG", "ENV"):
            declared |= set(re.findall(r"(\w+)=", rest)) | {rest.split("=")[0]}
    return wrong


def test_the_reader_joins_lines_and_sees_what_is_undeclared():
    text = "ARG A=1\n# RUN no\nFROM ${A}\nRUN one && \\\n    # why\n    two ${B}\n"
    assert instructions(text) == [("ARG", "A=1"), ("FROM", "${A}"), ("RUN", "one &&      two ${B}")]
    assert undeclared(instructions(text)) == {"B"}


@pytest.mark.parametrize("name", FILES)
def test_a_dockerfile_is_complete(name):
    found = read(name)
    assert undeclared(found) == set()
    assert {"FROM", "LABEL", "USER", "HEALTHCHECK", "WORKDIR"} <= {kind for kind, _ in found}
    assert of("USER", name)[-1] not in ("root", "0")
    assert "useradd" in " ".join(of("RUN", name))
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', " ".join(of("LABEL", name))))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert labels.keys() == {"title", "description", "licenses", "version"}
    assert (labels["licenses"], labels["version"]) == (project["license"], project["version"])


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_not_ignored(name):
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert "." in copied(name)
    for source in copied(name):
        assert (ROOT / source).exists(), source
        assert not [pattern for pattern in ignored if fnmatch.fnmatch(source, pattern)], source
    for folder in (".git", ".venv", ".cache", "runs"):
        assert folder in ignored


@pytest.mark.parametrize("name", FILES)
def test_the_health_check_runs_the_doctor(name):
    command = json.loads(of("HEALTHCHECK", name)[0].partition("CMD ")[2])
    assert [Path(word).name for word in command] == ["python", "doctor.py", "--health"]
    assert (ROOT / "tools" / "doctor.py").exists()


def test_versions_of_python_and_of_the_base():
    assert of("FROM", "Dockerfile") == ["${BASE}"]
    assert "BASE=nvcr.io/nvidia/pytorch:26.06-py3" in of("ARG", "Dockerfile")
    assert "== (3, 12)" in of("RUN", "Dockerfile")[0]
    assert of("FROM", "Dockerfile.cpu") == ["python:3.11-slim"]
    assert "!= 3.11 ]" in (ROOT / "tools" / "setup_cpu.sh").read_text()


def test_no_step_of_the_gpu_image_may_replace_the_containers_torch():
    found = read("Dockerfile")
    constraint = found.index(("ENV", "PIP_CONSTRAINT=/opt/kept.txt"))
    installs = [
        (at, rest) for at, (kind, rest) in enumerate(found) if kind == "RUN" and " install " in f" {rest}"
    ]
    assert installs and all(at > constraint for at, _ in installs)
    for _, rest in installs:
        for part in rest.split("&&"):  # only the engines' environment is free of the constraint
            assert ("PIP_CONSTRAINT=''" in part) == ("--python /opt/engines/bin/python" in part)
    assert "grep -vxFf /opt/installed.txt /opt/kept.txt" in " ".join(of("RUN", "Dockerfile"))


def test_the_engines_python_leaves_the_containers_torch_out_of_the_library_path(tmp_path):
    """It lies beside the environment's bin/, as the Dockerfile puts it."""
    assert "tools/engine_python.sh /opt/engines/python" in of("COPY", "Dockerfile")
    (tmp_path / "bin").mkdir()
    (tmp_path / "python").write_bytes((ROOT / "tools" / "engine_python.sh").read_bytes())
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\necho "$LD_LIBRARY_PATH" "$@"\n')
    for path in (tmp_path / "python", tmp_path / "bin" / "python"):
        path.chmod(0o755)

    def run(path: str | None) -> str:
        kept = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
        environment = kept if path is None else kept | {"LD_LIBRARY_PATH": path}
        command = [str(tmp_path / "python"), "-m", "a module"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    torch = "/usr/local/lib/python3.12/dist-packages/torch/lib"
    assert run(f"{torch}:/usr/local/cuda/compat/lib:{torch}_x:/opt/nccl") == (
        "/usr/local/cuda/compat/lib:/opt/nccl -m a module\n"
    )
    assert run(None) == run(torch) == " -m a module\n"
