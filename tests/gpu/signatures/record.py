"""Writes the snapshots megatron_core.json, vllm.json and transformer_engine.json beside this file: what this
project calls in these packages, and the signatures that it relies on, of several versions.

    python tests/gpu/signatures/record.py

fetches each version's wheel once (pip; vLLM's has 340 MB) and keeps its sources in .cache/signatures/;
nothing of them is imported. Look at the difference before you commit it: each line is a call to look at.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/gpu

from signatures.reading import Sources
from signatures.snapshot import FOLDER, PACKAGES, ROOT, as_json, make_rows, options_of, routes_of

VERSIONS = {
    "megatron-core": ["0.16.1", "0.19.2"],
    "vllm": ["0.32.0", "0.33.0"],
    "transformer-engine": ["2.9.0", "2.17.1", "2.20.2"],
}
KEPT = ROOT / ".cache/signatures"


def fetched(package: str, version: str) -> Path:
    """The folder with the Python sources of a version's wheel."""
    folder = KEPT / f"{package}-{version}"
    if not folder.is_dir():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as work:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work]
            command += ["--python-version=3.12", "--only-binary=:all:", f"{package}=={version}"]
            subprocess.run(command, check=True)
            [wheel] = Path(work).glob("*.whl")
            unpacked = Path(work) / "unpacked"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked, [n for n in archive.namelist() if n.endswith(".py")])
            unpacked.rename(folder)
    return folder


def main() -> None:
    sources = {
        package: {version: Sources(fetched(package, version)) for version in VERSIONS[package]}
        for package in PACKAGES
    }
    for package, versions in sources.items():
        rows, absent = make_rows(package, versions, megatron=sources["megatron-core"])
        content = {"versions": list(versions), "rows": rows}
        if package == "vllm":
            content |= {"options": options_of(versions), "routes": routes_of(versions)}
        file = FOLDER / f"{package.replace('-', '_')}.json"
        file.write_text(as_json(content))
        print(f"{file.name}: {len(rows)} names of {', '.join(versions)}")
        for name, missing in absent.items():
            print(f"  {name} is not in {', '.join(missing)}")


if __name__ == "__main__":
    main()
