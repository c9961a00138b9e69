#!/usr/bin/env bash
# DAPO of a real language model, SmolLM2-135M-Instruct, on a CPU: small arithmetic problems, or your own.
#   bash examples/run_smollm2.sh [section.key=value ...]        e.g. data.path=problems.jsonl evaluation.path=held_out.jsonl
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
base=$root/.cache/smollm2 data=$root/.cache/arithmetic

bash "$root/tools/setup_cpu.sh"
"$python" "$root/examples/make_smollm2.py" --out "$base"
"$python" "$root/examples/make_arithmetic.py" --out "$data"
exec "$python" -m megatron_dapo.train "$root/examples/configs/smollm2.yaml" \
  "model.path=$base" "data.path=$data/train.jsonl" "evaluation.path=$data/eval.jsonl" "run.dir=$root/runs/smollm2" "$@"
