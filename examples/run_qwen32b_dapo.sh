#!/usr/bin/env bash
#SBATCH --job-name=qwen32b_dapo --nodes=16 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#SBATCH --signal=B:USR1@600 --requeue --open-mode=append
# The paper's run: Qwen2.5-32B base on 16 nodes x 8 H100 (configs/qwen32b.yaml). NOT RUN YET.
#
#   bash examples/run_qwen32b_dapo.sh [section.key=value ...] [--dry-run] [--help]
#
# Plainly, on every node, with the same MASTER_ADDR and its own NODE_RANK:
#   NNODES=16 NODE_RANK=0 MASTER_ADDR=host0 bash examples/run_qwen32b_dapo.sh
# Under Slurm, once; it starts itself on every node. In a shell inside salloc --exclusive without sbatch:
#   sbatch examples/run_qwen32b_dapo.sh
# In a container, before either of them:
#   CONTAINER_IMAGE=IMAGE CONTAINER_MOUNTS=/data:/data,/models:/models:ro
#
# --dry-run starts nothing and needs no GPU: the script for sbatch, every node's environment and commands, the
# plan (memory by phase, seconds by stage, bytes by link), and whether the run would be refused.
# Before any rank starts, node 0 checks settings, model, data and planned memory; a refusal ends the launch.
# Ten minutes before its time ends Slurm sends USR1: the run saves a checkpoint and the job is queued again.
# TERM and Ctrl-C save one too. run.dir is shared by all nodes; rank 0 reaches all engines by address.
#
# Environment, with defaults:
#   NNODES=16 (under Slurm the job's)  GPUS_PER_NODE=8  NODE_RANK  MASTER_ADDR  MASTER_PORT=29500
#   PYTHON=python       in the container, where there is one
#   CONFIG=qwen32b      a name in examples/configs, or a YAML file
#   SERVING_NODES=0     the last nodes, with engines and no ranks (megatron_dapo.serve); 12 by qwen32b_async.
#                       More may join later, with a NODE_RANK of their own; TERM makes one leave
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   the interface that leads to MASTER_ADDR
#   PREFLIGHT=deep      none: no check before torchrun; rank 0's own plans no memory
#   CONTAINER_RUNTIME   pyxis under Slurm, else docker
#   CONTAINER_MOUNTS    SOURCE:TARGET[:ro],... beside this repository, which keeps its path; of HF_HOME too
#   CONTAINER_WORKDIR   this repository; relative paths in settings start there
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }

dry_run=false on_node=false preflight_only=false overrides=()
for argument in "$@"; do
  case $argument in
    -h | --help) sed -n '/^# The paper/,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run) dry_run=true ;;
    --on-node) on_node=true ;; # by srun below
    --preflight-only) preflight_only=true ;;
    -*) fail "$argument is no option of this script; see --help" ;;
    *) overrides+=("$argument") ;;
  esac
done

# sbatch copies this file elsewhere
root=${MEGATRON_DAPO_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
[ -f "$root/examples/configs/qwen32b.yaml" ] || root=${SLURM_SUBMIT_DIR:-.}
script=$root/examples/run_qwen32b_dapo.sh name=${CONFIG:-qwen32b}
case $name in
  *.yaml) config=$(realpath -- "$name") name=$(basename "$name" .yaml) ;;
  *) config=$root/examples/configs/$name.yaml ;;
esac
[ -f "$config" ] || fail "CONFIG: no $config; submit from the repository or set MEGATRON_DAPO_ROOT"
python=${PYTHON:-python}

nnodes=${NNODES:-${SLURM_NNODES:-16}} gpus=${GPUS_PER_NODE:-8}
port=${MASTER_PORT:-29500} serving=${SERVING_NODES:-0} preflight=${PREFLIGHT:-deep}
if [ "$name" = qwen32b_async ]; then serving=${SERVING_NODES:-12}; fi
for number in nnodes gpus; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] ||
    fail "$number='${!number}' must be a positive number (NNODES, GPUS_PER_NODE)"
done
[[ $serving =~ ^[0-9]+$ ]] && [ "$serving" -lt "$nnodes" ] ||
  fail "SERVING_NODES=$serving must be a number below NNODES=$nnodes"
training=$((nnodes - serving)) # those with ranks, the first ones
[[ $preflight =~ ^(deep|none)$ ]] || fail "PREFLIGHT=$preflight must be deep or none"

# --- where

slurm_job=false hosts=()
if [ -n "${SLURM_JOB_ID:-}" ] && ! $on_node; then
  # a shell inside salloc may be a step of its own, so SLURM_STEP_ID does not tell
  slurm_job=true
  mapfile -t hosts < <(scontrol show hostnames "${SLURM_JOB_NODELIST:-}")
  MASTER_ADDR=${MASTER_ADDR:-${hosts[0]:-}}
fi
master=${MASTER_ADDR:-}
if [ "$nnodes" = 1 ] && [ -z "$master" ]; then master=127.0.0.1; fi
by_slurm=$slurm_job # also what a dry run before sbatch plans
if $dry_run && [ -z "$master" ]; then by_slurm=true; fi

image=${CONTAINER_IMAGE:-} runtime=${CONTAINER_RUNTIME:-none}
mounts=$root:$root${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS} workdir=${CONTAINER_WORKDIR:-$root}
if [ -n "$image" ] && [ -z "${CONTAINER_RUNTIME:-}" ]; then
  runtime=docker
  if $by_slurm || $on_node; then runtime=pyxis; fi
fi
[[ "$runtime" =~ ^(pyxis|docker|none)$ ]] || fail "CONTAINER_RUNTIME=$runtime must be pyxis, docker or none"
if [ "$runtime" != none ] && [ -z "$image" ]; then fail "CONTAINER_RUNTIME=$runtime needs CONTAINER_IMAGE"; fi
if [ "$runtime" = pyxis ] && ! $by_slurm && ! $on_node; then
  fail "CONTAINER_RUNTIME=pyxis is a plugin of srun; start this by sbatch, or choose docker"
fi

# --- with which commands

settings=("$config" "run.dir=$root/runs/${name}_dapo" "${overrides[@]}")
train=(megatron_dapo.train "${settings[@]}")
serve=("$python" -m megatron_dapo.serve "${settings[@]}" --join "${master:-MASTER_ADDR}:$port")
torchrun=("$python" -m torch.distributed.run --nnodes="$training" --nproc-per-node="$gpus")
# torchrun kills its ranks 30 s after a signal, too early for a checkpoint: `pass_on` sends it to them instead
torchrun+=(--signals-to-handle=SIGQUIT --master-addr="${master:-MASTER_ADDR}" --master-port="$port")
check=(env WORLD_SIZE=$((training * gpus)) LOCAL_WORLD_SIZE="$gpus") # as torchrun will say it
check+=("$python" -m "${train[@]}" --dry-run --deep)

step=(--ntasks-per-node=1 --gpus-per-node="$gpus")
# srun does not take the job's cores by itself, and would bind all ranks to one
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-}}
step+=(${cpus:+--cpus-per-task="$cpus"} --cpu-bind=none --kill-on-bad-exit=1 --overlap --export=ALL)
if [ "$runtime" = pyxis ]; then
  step+=(--container-image="$image" --container-mounts="$mounts" --container-workdir="$workdir")
fi
step+=(bash "$script" --on-node)
on_all=(srun --nodes="$nnodes" --ntasks="$nnodes" "${step[@]}" "${overrides[@]}")
on_one=(srun --nodes=1 --ntasks=1 "${step[@]}" --preflight-only "${overrides[@]}")

node=${NODE_RANK:-${SLURM_NODEID:-0}} container=${name}_dapo_$$
in_docker() { # set `docker_run`: this script once more, in a container on this node
  local mount variable
  docker_run=(docker run --rm --name "$container" --sig-proxy=false --gpus all --ipc=host --network=host)
  docker_run+=(--ulimit memlock=-1 --ulimit stack=67108864 --ulimit nofile=1048576:1048576)
  if [ -d /dev/infiniband ]; then docker_run+=(--device /dev/infiniband); fi
  # files of the run belong to who starts it; caches need a home
  docker_run+=(--user "$(id -u):$(id -g)" -e HOME=/tmp -e USER="$(id -un)" -w "$workdir")
  for mount in ${mounts//,/ }; do docker_run+=(-v "$mount"); done
  docker_run+=(-e MEGATRON_DAPO_ROOT="$root" -e CONFIG="$config" -e PREFLIGHT="$preflight")
  docker_run+=(-e NNODES="$nnodes" -e GPUS_PER_NODE="$gpus" -e SERVING_NODES="$serving" -e NODE_RANK="$node")
  docker_run+=(-e MASTER_ADDR="$master" -e MASTER_PORT="$port")
  for variable in $(compgen -e); do # by name alone: no secret stands on a command line
    case $variable in
      PYTHON | CUDA_VISIBLE_DEVICES | NCCL_* | GLOO_* | UCX_* | TORCH_* | PYTORCH_* | NVTE_* | VLLM_* | OMP_*)
        docker_run+=(-e "$variable") ;;
      HF_* | WANDB_*) docker_run+=(-e "$variable") ;;
    esac
  done
  docker_run+=("$image" bash "$script")
  if $on_node; then docker_run+=(--on-node); fi
  if $preflight_only; then docker_run+=(--preflight-only); fi
  docker_run+=("${overrides[@]}")
}

# --- what would be started

quoted() {
  local words
  words=$(printf '%q ' "$@")
  echo "${words% }"
}
show_sbatch() {
  local variable variables=(MEGATRON_DAPO_ROOT="$root" CONFIG="$config")
  echo "# the script for sbatch:"
  sed -n "/^#SBATCH/{s/--job-name=[^ ]*/--job-name=${name}_dapo/;s/--nodes=[^ ]*/--nodes=$nnodes/
          s/--gpus-per-node=[^ ]*/--gpus-per-node=$gpus/;p}" "$script" | sed '1i #!/usr/bin/env bash'
  for variable in GPUS_PER_NODE SERVING_NODES MASTER_PORT PYTHON PREFLIGHT CONTAINER_RUNTIME CONTAINER_IMAGE \
    CONTAINER_MOUNTS CONTAINER_WORKDIR GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME; do
    if [ -n "${!variable:-}" ]; then variables+=("$variable=${!variable}"); fi
  done
  echo "export $(quoted "${variables[@]}")"
  quoted exec bash "$script" "${overrides[@]}"
}
show_nodes() {
  local n role leads="the interface to ${master:-MASTER_ADDR}"
  echo "# environment of every node: MASTER_ADDR=${master:-the first node} MASTER_PORT=$port" \
    "CUDA_DEVICE_MAX_CONNECTIONS=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$leads}" \
    "NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$leads}"
  for ((n = 0; n < nnodes; n++)); do
    role="engines alone"
    if [ "$n" -lt "$training" ]; then role="RANK=$((n * gpus)) to $((n * gpus + gpus - 1))"; fi
    echo "# node $n${hosts[n]:+ (${hosts[n]})}: NODE_RANK=$n, $role"
  done
}
if $dry_run; then
  each=each with_ranks=""
  if [ "$serving" -gt 0 ]; then each="each of the first $training" with_ranks=" with ranks"; fi
  echo "# hosts: $nnodes (${hosts[*]:-node 0 is ${master:-MASTER_ADDR}})," \
    "$gpus ranks on $each, $((training * gpus)) in all"
  echo "# ports: $port on ${master:-MASTER_ADDR} for torchrun; free ones for the ranks among each other," \
    "for rank 0's lifeline and (without rollout.base_port) for engines"
  if [ "$runtime" != none ]; then echo "# container: $image by $runtime, with $mounts"; fi
  if $by_slurm; then
    show_sbatch
    if [ "$preflight" = deep ]; then echo "# first, on one host: $(quoted "${on_one[@]}")"; fi
    echo "# once: $(quoted "${on_all[@]}")"
  fi
  show_nodes
  if [ "$runtime" = docker ]; then
    in_docker
    echo "# on every host, for what follows: $(quoted "${docker_run[@]}")"
  fi
  if [ "$preflight" = deep ] && ! $by_slurm; then echo "# first, on host 0: $(quoted "${check[@]}")"; fi
  torchrun+=(--node-rank="${NODE_RANK:-NODE_RANK}")
  echo "# on every host$with_ranks: $(quoted "${torchrun[@]}" -m "${train[@]}")"
  if [ "$serving" -gt 0 ]; then echo "# on every other host: $(quoted "${serve[@]}")"; fi
  status=0
  echo "# the plan:"
  "$python" "$root/tools/plan.py" run --config "$config" "${overrides[@]}" --nnodes "$nnodes" \
    --gpus-per-node "$gpus" || status=$?
  echo "# the settings, as this machine would check them:"
  "${check[@]}" || status=$?
  exit $status
fi
[ -n "$master" ] || fail "MASTER_ADDR is not set; give the address of the node with NODE_RANK=0"

# --- start, and pass signals on

serves=false && if [ "$node" -ge "$training" ]; then serves=true; fi
docker=false && if [ "$runtime" = docker ] && ! $slurm_job; then docker=true; fi
requeue=false child=""
pass_on() {
  if [ -z "$child" ]; then exit 0; fi
  # a job ends as a whole: its ranks save first, and their end is the engines'
  if $serves && $on_node; then return 0; fi
  if $docker; then
    docker kill --signal=TERM "$container" > /dev/null 2>&1 || kill -TERM "$child" # not there yet
  elif $slurm_job; then
    kill -USR1 "$child" # srun gives it to this script on every node
  elif $serves; then
    kill -TERM "$child"
  else
    # torchrun's children are the ranks
    cat /proc/"$child"/task/*/children 2>/dev/null | xargs -r kill -TERM || true
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
  export MASTER_ADDR MEGATRON_DAPO_ROOT=$root CONFIG=$config
  if [ "$preflight" = deep ]; then "${on_one[@]}" || exit; fi
  supervise "${on_all[@]}"
  if $requeue; then exec scontrol requeue "$SLURM_JOB_ID"; fi
  exit 0
fi
if $docker; then
  in_docker
  supervise "${docker_run[@]}"
  exit
fi
if $preflight_only || { [ "$preflight" = deep ] && [ "$node" = 0 ] && ! $on_node; }; then
  "${check[@]}" > /dev/null ||
    fail "no rank was started, for the reason above; PREFLIGHT=none starts them all the same"
  if $preflight_only; then exit 0; fi
fi
if [ "$nnodes" -gt 1 ]; then
  interface=$("$python" "$root/tools/network_interface.py" "$master")
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
  export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
fi
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron-Core wants it with tensor parallelism before Blackwell
files=$(ulimit -Hn)
if [ "$files" = unlimited ] || [ "$files" -gt 1048576 ]; then files=1048576; fi
ulimit -n "$files" # sockets of all ranks to all others, and of rank 0 to the engines
if $serves; then supervise "${serve[@]}"; exit; fi
supervise "${torchrun[@]}" --node-rank="$node" -m "${train[@]}"
