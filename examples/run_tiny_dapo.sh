#!/usr/bin/env bash
# DAPO on a CPU laptop, from nothing: environment, a tiny base model made on the spot, then training with held-out evaluation.
#   bash examples/run_tiny_dapo.sh [section.key=value ...]      e.g. run.max_steps=5 layout.tensor_parallel=2
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
base=$root/.cache/tiny_base

bash "$root/tools/setup_cpu.sh"
OMP_WAIT_POLICY=PASSIVE "$python" "$root/examples/make_tiny_base.py" --out "$base"
exec "$python" -m megatron_dapo.train "$root/examples/configs/tiny.yaml" \
  "model.path=$base" "data.path=$base/train.jsonl" "evaluation.path=$base/eval.jsonl" "run.dir=$root/runs/tiny_dapo" "$@"
