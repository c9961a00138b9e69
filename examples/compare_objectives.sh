#!/usr/bin/env bash
# ppo, dpo, grpo and dapo side by side on a CPU laptop, from one tiny base model: equal updates, equal numbers of sampled responses.
#   bash examples/compare_objectives.sh [--seeds 2] [--steps 20] [--objectives ppo,dpo,grpo,dapo|all] [section.key=value ...]
# Prints a table and draws runs/compare_objectives/comparison.png; runs that are there already are not made again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
base=$root/.cache/tiny_base

bash "$root/tools/setup_cpu.sh"
OMP_WAIT_POLICY=PASSIVE "$python" "$root/examples/make_tiny_base.py" --out "$base"
exec "$python" "$root/tools/compare_objectives.py" --base "$base" --out "$root/runs/compare_objectives" "$@"
