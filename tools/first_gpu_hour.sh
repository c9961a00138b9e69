#!/usr/bin/env bash
# What to run first on a machine with GPUs: an ordered list of checks, each with what is expected and what to do
# when it differs, and one report of them all (docs/first-gpu-hour.md).
#   bash tools/first_gpu_hour.sh [--gpus 1|8] [--out DIR] [--from CHECK] [--list] [--dry-run]
# PYTHON=python3.12 chooses the interpreter; default: .venv's if there is one, else `python`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python; fi
fi
exec "$python" tools/first_hour/hour.py "$@"
