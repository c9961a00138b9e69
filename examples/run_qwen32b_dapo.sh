#!/usr/bin/env bash
# The paper's run: Qwen2.5-32B base on 16 nodes x 8 H100 (configs/qwen32b.yaml). NOT RUN YET.
#   bash examples/run_qwen32b_dapo.sh [section.key=value ...] [--dry-run]
# On every node, with the same MASTER_ADDR and its own NODE_RANK:
#   NNODES=16 NODE_RANK=0 MASTER_ADDR=host0 bash examples/run_qwen32b_dapo.sh
# Under Slurm (sbatch or salloc), once:
#   sbatch --nodes=16 --ntasks-per-node=1 --gpus-per-node=8 examples/run_qwen32b_dapo.sh
# Also read: NNODES, GPUS_PER_NODE (8), MASTER_PORT (29500), PYTHON (python).
#
# TODAY THE POLICY RUNS ON ONE HOST ONLY: weights reach the engines through memory that one host shares (sync/shm.py), and
# each host would need engines that register with the controller. So more than one node is refused below, instead of hanging after
# an hour. One node does work as a launch, with a layout and a model that fit on it. --dry-run plans any size, without GPUs.
set -euo pipefail
root=${MEGATRON_DAPO_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)} # sbatch copies this file elsewhere
if [ ! -f "$root/examples/configs/qwen32b.yaml" ]; then
  root=${SLURM_SUBMIT_DIR:-.}
fi
config=$root/examples/configs/qwen32b.yaml
[ -f "$config" ] || { echo "error: no $config; submit from the repository or set MEGATRON_DAPO_ROOT" >&2; exit 2; }
python=${PYTHON:-python}

dry_run=false overrides=()
for argument in "$@"; do
  if [ "$argument" = --dry-run ]; then dry_run=true; else overrides+=("$argument"); fi
done
command=(megatron_dapo.train "$config" "run.dir=$root/runs/qwen32b_dapo" "${overrides[@]}")
if $dry_run; then
  exec "$python" -m "${command[@]}" --dry-run
fi

nnodes=${NNODES:-${SLURM_NNODES:-16}}
gpus=${GPUS_PER_NODE:-8}
for name in nnodes gpus; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || { echo "error: $name='${!name}' must be a positive number (NNODES, GPUS_PER_NODE)" >&2; exit 2; }
done

if [ "$nnodes" -gt 1 ]; then
  echo "error: NNODES=$nnodes, but policy ranks on several hosts are not supported yet: weights travel through the memory of one host." >&2
  echo "Use NNODES=1 with a layout and a model for one host, e.g. NNODES=1 bash $0 model.path=Qwen/Qwen2.5-7B" \
    "layout.tensor_parallel=4 layout.pipeline_parallel=1 layout.data_parallel=2; --dry-run plans the full run." >&2
  exit 2
fi

# What several nodes will need is here already: Slurm starts this script once more on every node.
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR MEGATRON_DAPO_ROOT=$root
  exec srun --nodes="$nnodes" --ntasks="$nnodes" --ntasks-per-node=1 bash "$root/examples/run_qwen32b_dapo.sh" "$@"
fi
node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}
if [ "$nnodes" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
  echo "error: MASTER_ADDR is not set; give the address of the node with NODE_RANK=0" >&2
  exit 2
fi

export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron-Core wants it with tensor parallelism before Blackwell
exec "$python" -m torch.distributed.run --nnodes="$nnodes" --nproc-per-node="$gpus" --node-rank="$node_rank" \
  --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${MASTER_PORT:-29500}" \
  -m "${command[@]}"
