#!/usr/bin/env bash
# Make .venv with the complete CPU stack (real megatron-core, real vLLM). Idempotent; prints nothing when there is nothing to do.
#   bash tools/setup_cpu.sh            PYTHON=/path/to/python3.11 chooses the interpreter
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$root/.venv
stamp=$venv/.stamp
wanted=$(cat "$root/requirements-cpu.txt" "$root/pyproject.toml" | sha256sum | cut -d' ' -f1)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted $root" ] && exit 0

say() { echo "[setup] $*" >&2; }
python=${PYTHON:-$(command -v python3.11 || true)}
if [ -z "$python" ] || [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != 3.11 ]; then
  say "Python 3.11 is needed (megatron-core 0.16.1 and the lock are for it) and '${python:-python3.11}' is not it."
  say "Install it (Debian 12: apt install python3.11-venv; elsewhere: 'uv python install 3.11' or pyenv) or set PYTHON=/path/to/python3.11."
  exit 1
fi

say "making .venv (about 3 minutes)"
"$python" -m venv "$venv" || { say "python3.11 has no venv module: apt install python3.11-venv"; exit 1; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# PyPI's torch for Linux is a CUDA build. Prefer a CPU wheel that pip already finds; else PyTorch's public CPU index.
version=$(sed -n 's/^torch==//p' "$root/requirements-cpu.txt")
if ! "$venv/bin/python" -c "import torch; assert torch.__version__ == '$version+cpu'" 2>/dev/null; then
  pip install -qq --no-deps "torch==$version+cpu" 2>/dev/null ||
    pip install -qq --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu" || {
      say "no CPU wheel of torch $version: pip found none and PyTorch's public CPU index did not answer."
      say "Download torch-$version+cpu-cp311-*.whl on another machine, then: PIP_FIND_LINKS=/folder/with/it bash tools/setup_cpu.sh"
      exit 1
    }
fi
lock=$(mktemp)
trap 'rm -f "$lock"' EXIT
grep -v '^torch==' "$root/requirements-cpu.txt" > "$lock"
pip install -qq --no-deps -r "$lock"
pip install -qq --no-deps --no-build-isolation --editable "$root"

say "checking the imports"
(cd / && "$venv/bin/python" - <<'PY') || { say "the environment does not import; remove .venv and run this again"; exit 1; }
import importlib.metadata, importlib.util, warnings
warnings.simplefilter("ignore")
import torch, megatron.core, transformers, vllm, math_verify, megatron_dapo, dapo
assert not torch.version.cuda, "a CUDA build of torch was installed"
for absent in ("torchvision", "torchaudio", "torchcodec"):
    assert importlib.util.find_spec(absent) is None, f"{absent} must be absent: its wheel does not load beside the CPU build of torch"
names = {e.name for e in importlib.metadata.entry_points(group="vllm.general_plugins")}
assert "megatron_dapo" in names, "the vLLM plugin is not registered"
PY
echo "$wanted $root" > "$stamp"
say "ready: torch $version (CPU), $(grep -c == "$root/requirements-cpu.txt") packages"
