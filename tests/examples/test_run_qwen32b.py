"""The flagship's script: what it starts, plainly and under Slurm, and what it refuses. Nothing is trained."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "run_qwen32b_dapo.sh"
CONFIG = ROOT / "examples" / "configs" / "qwen32b.yaml"
SETTINGS = (
    *("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE", "MEGATRON_DAPO_ROOT"),
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "CONFIG", "SERVING_NODES"),
)


@pytest.fixture
def tiny_shape(tmp_path) -> Path:
    """A configuration and a tokenizer file; a plan needs no weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    shape = {
        "vocab_size": 128,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "rms_norm_eps": 1e-6,
    }
    heads = {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_theta": 10000.0,
        **shape,
        **heads,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


AS_FROM_A_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""
# Both ranks of a torchrun that runs until each was told to stop; the file says that they are ready.
TORCHRUN = """#!/bin/sh
echo python "$@"
if [ -n "$RANKS_READY" ]; then
  for rank in 0 1; do
    sh -c 'trap "echo saved; exit 0" TERM; echo > "$RANKS_READY.$0"; while :; do sleep 0.05; done' $rank &
  done
  wait
  wait
fi
"""
# srun on one node: it passes USR1 on to its task, the script, and that alone.
SRUN = """#!/bin/bash
echo srun "$@"
if [ -n "$RANKS_READY" ]; then
  while [ "$1" != bash ]; do shift; done
  SLURM_STEP_ID=0 "$@" &
  task=$!
  trap 'kill -USR1 $task' USR1
  wait $task
  wait $task
fi
"""
PROGRAMS = {
    "python": TORCHRUN,
    "srun": SRUN,
    "scontrol": """#!/bin/sh
if [ $1 = show ]; then printf 'host7\\nhost8\\n'; else echo scontrol "$@"; fi
""",
}


@pytest.fixture
def launch(tmp_path):
    """Start the script with a `python`, an `srun` and a `scontrol` that print their arguments."""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS and not k.startswith("SLURM_")}
    started: list[subprocess.Popen[str]] = []

    def launch(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        env = {**clean, "PATH": f"{tmp_path}:{clean['PATH']}", **environment}
        env["PYTHON"] = str(tmp_path / "python")
        pipe = subprocess.PIPE
        # a shell cannot trap what it was started to ignore, as everything in a script's background is
        command = [sys.executable, "-c", AS_FROM_A_TERMINAL, "bash", str(SCRIPT), *arguments]
        started.append(
            subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        )
        return started[-1]

    yield launch
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def start(launch):
    """Run the script to its end."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = launch(*arguments, **environment)
        out, error = process.communicate(timeout=30)
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    return run


# The variables of a job on two nodes; in its batch script, in a shell inside salloc, and in a step of its own
# (srun --pty bash), where a step is known by its number.
JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "host[7-8]",
    "SLURM_CPUS_ON_NODE": "96",
}
PLACES = {"batch": {}, "salloc": {"SLURM_STEP_ID": "4294967290"}, "pty": {"SLURM_STEP_ID": "0"}}


def test_one_node(start):
    found = start("run.max_steps=2", NNODES="1", GPUS_PER_NODE="4", MASTER_PORT="1234")
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [
        *["python", "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=4"],
        *["--signals-to-handle=SIGQUIT", "--master-addr=127.0.0.1", "--master-port=1234", "--node-rank=0"],
        *["-m", "megatron_dapo.train", str(CONFIG), f"run.dir={ROOT}/runs/qwen32b_dapo", "run.max_steps=2"],
    ]


def test_what_the_ranks_get(start, tmp_path):
    (tmp_path / "show").write_text(
        "#!/bin/sh\necho $CUDA_DEVICE_MAX_CONNECTIONS $(ulimit -Sn) $(ulimit -Hn)\n"
    )
    (tmp_path / "show").chmod(0o755)
    (tmp_path / "python").unlink()
    (tmp_path / "python").symlink_to("show")
    connections, soft, hard = start(NNODES="1").stdout.split()
    assert connections == "1"
    assert int(soft) == min(int(hard) if hard != "unlimited" else 1 << 20, 1 << 20)


# `python` as it asks for the interface that leads to the first node, and as torchrun.
SEVERAL = """#!/bin/sh
case $1 in
  */network_interface.py) [ "$2" = host0 ] && echo eth7 ;;
  *) echo "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME" "$@" ;;
esac
"""


def test_one_of_several_nodes(start, tmp_path):
    (tmp_path / "python").write_text(SEVERAL)
    found = start(NNODES="2", NODE_RANK="1", MASTER_ADDR="host0", NCCL_SOCKET_IFNAME="ib0")
    assert found.returncode == 0, found.stderr
    words = found.stdout.split()
    assert words[:2] == ["eth7", "ib0"]
    assert {"--nnodes=2", "--nproc-per-node=8", "--master-addr=host0", "--node-rank=1"} < {*words}


ASYNC = {"CONFIG": "qwen32b_async", "NNODES": "16", "MASTER_ADDR": "host0", "GLOO_SOCKET_IFNAME": "eth0"}


@pytest.mark.parametrize("place", [{}, {"SLURM_JOB_ID": "17", "SLURM_NODEID": "15"}])
def test_the_last_nodes_serve(start, tmp_path, place):
    (tmp_path / "python").write_text(SEVERAL)
    on_node = ["--on-node"] if place else []
    found = start("run.max_steps=2", *on_node, **ASYNC, **(place or {"NODE_RANK": "4"}))
    assert found.returncode == 0, found.stderr
    config = ROOT / "examples" / "configs" / "qwen32b_async.yaml"
    assert found.stdout.split()[2:] == [
        *["-m", "megatron_dapo.serve", str(config), f"run.dir={ROOT}/runs/qwen32b_async_dapo"],
        *["run.max_steps=2", "--join", "host0:29500"],
    ]
    found = start(**ASYNC, NODE_RANK="3")
    assert {"--nnodes=4", "--node-rank=3", "megatron_dapo.train"} < {*found.stdout.split()}


@pytest.mark.parametrize("number", ["16", "17", "two"])
def test_some_nodes_must_have_ranks(start, number):
    found = start(**ASYNC, SERVING_NODES=number)
    assert (
        found.returncode == 2 and f"SERVING_NODES={number} must be a number below NNODES=16" in found.stderr
    )


def test_dry_run_shows_which_nodes_serve(start):
    lines = plan(start("--dry-run", **ASYNC))
    assert lines["hosts"] == "16 (node 0 is host0), 8 ranks on each of the first 4, 32 in all"
    assert "--nnodes=4" in lines["on every host with ranks"].split()
    assert lines["on every other host"].endswith("--join host0:29500")


def test_several_nodes_need_an_address(start):
    found = start(NNODES="2")
    assert (found.returncode, found.stdout) == (2, "")
    assert "MASTER_ADDR is not set" in found.stderr


def test_a_job_on_several_nodes_starts_a_step_on_all(start):
    found = start(**JOB)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 ")


# --- what would be started --------------------------------------------------------------


def plan(found: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The lines of the script's own part of a dry run, by their title."""
    assert found.returncode == 0, found.stderr
    lines = [line[2:] for line in found.stdout.splitlines() if line.startswith("# ")]
    return dict(line.split(": ", 1) for line in lines)


def test_dry_run_plans_any_size(start):
    found = start("--dry-run", "run.max_steps=2", NNODES="16", NODE_RANK="3", MASTER_ADDR="host0")
    lines = plan(found)
    assert lines["hosts"] == "16 (node 0 is host0), 8 ranks on each, 128 in all"
    assert lines["ports"].startswith("29500 on host0 for torchrun")
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1 GLOO_SOCKET_IFNAME=the interface to host0" in lines["environment"]
    assert "once" not in lines
    words = lines["on every host"].split()
    assert words[1:5] == ["-m", "torch.distributed.run", "--nnodes=16", "--nproc-per-node=8"]
    assert {"--master-addr=host0", "--master-port=29500", "--node-rank=3", "run.max_steps=2"} < {*words}
    last = found.stdout.splitlines()[-1].split()
    assert last[:3] == ["python", "-m", "megatron_dapo.train"]
    assert last[-2:] == ["run.max_steps=2", "--dry-run"]


def test_dry_run_without_an_address_says_what_is_missing(start):
    assert plan(start("--dry-run"))["hosts"].startswith("16 (node 0 is MASTER_ADDR)")


@pytest.mark.parametrize("place", PLACES)
def test_dry_run_under_slurm(start, place):
    lines = plan(start("--dry-run", "run.max_steps=2", **JOB, **PLACES[place]))
    assert lines["hosts"] == "2 (host7 host8), 8 ranks on each, 16 in all"
    assert "--master-addr=host7" in lines["on every host"].split()
    assert lines["once"].split() == [
        *[
            "srun",
            "--nodes=2",
            "--ntasks=2",
            "--ntasks-per-node=1",
            "--gpus-per-node=8",
            "--cpus-per-task=96",
        ],
        *["--cpu-bind=none", "--kill-on-bad-exit=1", "--overlap", "--export=ALL"],
        *["bash", str(SCRIPT), "--on-node", "run.max_steps=2"],
    ]


def test_the_interface_can_be_chosen(start):
    lines = plan(start("--dry-run", MASTER_ADDR="host0", GLOO_SOCKET_IFNAME="ib0"))
    assert "GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=the interface" in lines["environment"]


def test_what_sbatch_is_asked_for():
    asked = " ".join(line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH "))
    for word in ("--nodes=16", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive", "--requeue"):
        assert word in asked
    assert "--signal=B:USR1@600" in asked
    assert SCRIPT.read_text().splitlines()[1].startswith("#SBATCH")  # Slurm reads no further than a command


def test_dry_run_for_real(tiny_shape, tmp_path):
    """The shipped recipe, planned by the real program for a small model that the layout divides."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+1", "answer": "2"}\n')
    command = [
        "bash",
        str(SCRIPT),
        "--dry-run",
        f"model.path={tiny_shape}",
        f"data.path={data}",
        "evaluation.path=null",
    ]
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS and not k.startswith("SLURM_")}
    found = subprocess.run(
        command, env={**clean, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert "tp8 x pp4 x dp4 + sequence parallel = 128 policy ranks" in found.stdout
    assert "2 vLLM servers on each of 16 hosts of tensor-parallel size 4" in found.stdout
    assert "512 groups of 16 samples, 16 updates" in found.stdout
    assert "device: cuda" in found.stdout  # it is planned where there is none


# --- signals, on one node ---------------------------------------------------------------

ONE = {**JOB, "SLURM_NNODES": "1", "SLURM_NODEID": "0"}


@pytest.mark.parametrize("place", PLACES)
def test_slurm_job_starts_a_step_that_starts_the_ranks(start, place):
    found = start("run.max_steps=2", **ONE, **PLACES[place])
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("srun --nodes=1 --ntasks=1 --ntasks-per-node=1 ")
    assert found.stdout.endswith(f"bash {SCRIPT} --on-node run.max_steps=2\n")
    inside = start("--on-node", **ONE, SLURM_STEP_ID="0", MASTER_ADDR="host7")
    assert inside.stdout.startswith("python -m torch.distributed.run")
    assert {"--master-addr=host7", "--node-rank=0"} < {*inside.stdout.split()}


def ready(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(path.with_name(f"ready.{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("sign", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_and_not_torchrun(launch, tmp_path, sign):
    process = launch(NNODES="1", RANKS_READY=str(tmp_path / "ready"))
    ready(tmp_path / "ready")
    process.send_signal(sign)
    out, error = process.communicate(timeout=20)
    assert process.returncode == 0, error
    assert out.count("saved\n") == 2


@pytest.mark.parametrize(("sign", "queued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_before_the_time_is_up_a_job_saves_and_is_queued_again(launch, tmp_path, sign, queued):
    process = launch(**ONE, RANKS_READY=str(tmp_path / "ready"))
    ready(tmp_path / "ready")
    process.send_signal(sign)
    out, error = process.communicate(timeout=20)
    assert process.returncode == 0, error
    assert out.count("saved\n") == 2
    assert ("scontrol requeue 17\n" in out) == queued


SERVER = """#!/bin/sh
case $1 in */network_interface.py) exit ;; esac
trap "echo left; exit 0" TERM
echo > "$RANKS_READY.0"
echo > "$RANKS_READY.1"
for i in $(seq 100); do sleep 0.05; done
"""


@pytest.mark.parametrize(("on_node", "leaves"), [([], True), (["--on-node"], False)])
def test_a_node_that_serves_leaves_at_a_signal_and_a_job_ends_as_a_whole(launch, tmp_path, on_node, leaves):
    (tmp_path / "python").write_text(SERVER)
    process = launch(*on_node, **ASYNC, NODE_RANK="4", RANKS_READY=str(tmp_path / "ready"))
    ready(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    assert ("left\n" in out) == leaves


def test_a_run_that_fails_is_not_queued_again(start, tmp_path):
    (tmp_path / "srun").write_text("#!/bin/sh\ntrap '' USR1\nkill -USR1 $PPID\nsleep 0.2\nexit 3\n")
    found = start(**ONE)
    assert (found.returncode, found.stdout) == (3, "")


@pytest.mark.parametrize("value", ["0", "two", "-1"])
def test_a_wrong_number_of_nodes_is_named(start, value):
    found = start(NNODES=value)
    assert (found.returncode, found.stdout) == (2, "")
    assert f"nnodes='{value}' must be a positive number" in found.stderr
