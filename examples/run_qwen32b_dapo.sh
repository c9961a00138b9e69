#!/usr/bin/env bash
#SBATCH --job-name=qwen32b_dapo --nodes=16 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#SBATCH --signal=B:USR1@600 --requeue --open-mode=append
# The paper's run: Qwen2.5-32B base on 16 nodes x 8 H100 (configs/qwen32b.yaml). NOT RUN YET.
#   bash examples/run_qwen32b_dapo.sh [section.key=value ...] [--dry-run]
# Plainly: on every node, with the same MASTER_ADDR and its own NODE_RANK:
#   NNODES=16 NODE_RANK=0 MASTER_ADDR=host0 bash examples/run_qwen32b_dapo.sh
# Under Slurm: once; it starts itself on every node of the job. In a shell inside salloc (with --exclusive) the same, without sbatch:
#   sbatch examples/run_qwen32b_dapo.sh
# Ten minutes before its time ends Slurm sends USR1: the run saves a checkpoint and the job is queued again. TERM and Ctrl-C save one too.
# With CONFIG=qwen32b_async the last 12 nodes (SERVING_NODES) have no ranks, but engines, and join the run (megatron_dapo.serve). More may join
# later: NNODES=16 NODE_RANK=16 ... on any other node; a TERM to its script makes it leave.
# Also read: NNODES, GPUS_PER_NODE (8), MASTER_PORT (29500), PYTHON (python), GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (the interface
# that leads to MASTER_ADDR). --dry-run shows hosts, ranks, engines, ports, environment and commands, and needs no GPU.
# rank 0 reaches the rollout.engines engines of a node by its address; run.dir is shared by all nodes.
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }

root=${MEGATRON_DAPO_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)} # sbatch copies this file elsewhere
[ -f "$root/examples/configs/qwen32b.yaml" ] || root=${SLURM_SUBMIT_DIR:-.}
name=${CONFIG:-qwen32b}
config=$root/examples/configs/$name.yaml
[ -f "$config" ] || fail "no $config; submit from the repository or set MEGATRON_DAPO_ROOT"
python=${PYTHON:-python}

dry_run=false on_node=false overrides=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=true ;;
    --on-node) on_node=true ;; # by srun below
    *) overrides+=("$argument") ;;
  esac
done
nnodes=${NNODES:-${SLURM_NNODES:-16}} gpus=${GPUS_PER_NODE:-8} port=${MASTER_PORT:-29500} serving=${SERVING_NODES:-0}
if [ "$name" = qwen32b_async ]; then serving=${SERVING_NODES:-12}; fi
for number in nnodes gpus; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] || fail "$number='${!number}' must be a positive number (NNODES, GPUS_PER_NODE)"
done
[[ $serving =~ ^[0-9]+$ ]] && [ "$serving" -lt "$nnodes" ] || fail "SERVING_NODES=$serving must be a number below NNODES=$nnodes"
training=$((nnodes - serving)) # those with ranks, the first ones

# --- where, and with which commands

slurm_job=false hosts=()
if [ -n "${SLURM_JOB_ID:-}" ]; then
  mapfile -t hosts < <(scontrol show hostnames "${SLURM_JOB_NODELIST:-}")
  MASTER_ADDR=${MASTER_ADDR:-${hosts[0]:-}}
  $on_node || slurm_job=true # a shell inside salloc may be a step of its own, so SLURM_STEP_ID does not tell
fi
master=${MASTER_ADDR:-}
if [ "$nnodes" = 1 ] && [ -z "$master" ]; then master=127.0.0.1; fi

settings=("$config" "run.dir=$root/runs/${name}_dapo" "${overrides[@]}")
train=(megatron_dapo.train "${settings[@]}")
serve=("$python" -m megatron_dapo.serve "${settings[@]}" --join "${master:-MASTER_ADDR}:$port")
torchrun=("$python" -m torch.distributed.run --nnodes="$training" --nproc-per-node="$gpus")
# torchrun kills its ranks 30 s after a signal, which is too short for a checkpoint: `pass_on` sends it to the ranks instead
torchrun+=(--signals-to-handle=SIGQUIT --master-addr="${master:-MASTER_ADDR}" --master-port="$port")
step=(srun --nodes="$nnodes" --ntasks="$nnodes" --ntasks-per-node=1 --gpus-per-node="$gpus")
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-}} # srun does not take the job's by itself, and would bind all ranks to one core
step+=(${cpus:+--cpus-per-task="$cpus"} --cpu-bind=none --kill-on-bad-exit=1 --overlap --export=ALL)
step+=(bash "$root/examples/run_qwen32b_dapo.sh" --on-node "${overrides[@]}")

if $dry_run; then
  each=each with_ranks=""
  if [ "$serving" -gt 0 ]; then each="each of the first $training" with_ranks=" with ranks"; fi
  echo "# hosts: $nnodes (${hosts[*]:-node 0 is ${master:-MASTER_ADDR}}), $gpus ranks on $each, $((training * gpus)) in all"
  echo "# ports: $port on ${master:-MASTER_ADDR} for torchrun; free ones for the ranks among each other, for rank 0's lifeline and" \
    "(without rollout.base_port) for engines"
  interface="the interface to ${master:-MASTER_ADDR}"
  echo "# environment: CUDA_DEVICE_MAX_CONNECTIONS=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}" \
    "NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}"
  if $slurm_job; then echo "# once: ${step[*]}"; fi
  echo "# on every host$with_ranks: ${torchrun[*]} --node-rank=${NODE_RANK:-NODE_RANK} -m ${train[*]}"
  if [ "$serving" -gt 0 ]; then echo "# on every other host: ${serve[*]}"; fi
  export WORLD_SIZE=$((training * gpus)) LOCAL_WORLD_SIZE=$gpus # as torchrun will say it
  exec "$python" -m "${train[@]}" --dry-run
fi
[ -n "$master" ] || fail "MASTER_ADDR is not set; give the address of the node with NODE_RANK=0"

# --- start, and pass signals on

node=${NODE_RANK:-${SLURM_NODEID:-0}}
serves=false && if [ "$node" -ge "$training" ]; then serves=true; fi
requeue=false child=""
pass_on() {
  if [ -z "$child" ]; then exit 0; fi
  if $serves; then
    if ! $on_node; then kill -TERM "$child"; fi # a job ends as a whole: its ranks save first, and their end is the engines'
    return 0
  fi
  if $slurm_job; then
    kill -USR1 "$child" # srun gives it to this script on every node
  else
    cat /proc/"$child"/task/*/children 2>/dev/null | xargs -r kill -TERM || true # torchrun's children are the ranks
  fi
}
trap 'requeue=true; pass_on' USR1
trap pass_on TERM INT

supervise() { # a command, to its end; a signal interrupts `wait` alone
  "$@" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  wait "$child"
}

if $slurm_job; then
  export MASTER_ADDR MEGATRON_DAPO_ROOT=$root
  supervise "${step[@]}"
  if $requeue; then exec scontrol requeue "$SLURM_JOB_ID"; fi
  exit 0
fi
if [ "$nnodes" -gt 1 ]; then
  interface=$("$python" "$root/tools/network_interface.py" "$master")
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
fi
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron-Core wants it with tensor parallelism before Blackwell
files=$(ulimit -Hn)
if [ "$files" = unlimited ] || [ "$files" -gt 1048576 ]; then files=1048576; fi
ulimit -n "$files" # sockets of all ranks to all others, and of rank 0 to the engines
if $serves; then supervise "${serve[@]}"; exit; fi
supervise "${torchrun[@]}" --node-rank="$node" -m "${train[@]}"
