"""The flagship's script: what it starts, plainly and under Slurm, and what it refuses. Nothing is trained."""

from __future__ import annotations

import pytest
from support.launching import ASYNC, CONFIG, IMAGE, JOB, ONE, PLACES, ROOT, SCRIPT, SETTINGS


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


def test_several_nodes_need_an_address(start):
    found = start(NNODES="2")
    assert (found.returncode, found.stdout) == (2, "")
    assert "MASTER_ADDR is not set" in found.stderr


def test_a_job_on_several_nodes_starts_a_step_on_all(start):
    found = start(**JOB)
    assert found.returncode == 0, found.stderr
    first, then = found.stdout.splitlines()
    assert first.startswith("srun --nodes=1 --ntasks=1 --ntasks-per-node=1 ")
    assert "--preflight-only" in first.split()
    assert then.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 ")


@pytest.mark.parametrize("place", PLACES)
def test_slurm_job_starts_a_step_that_starts_the_ranks(start, place):
    found = start("run.max_steps=2", **ONE, **PLACES[place])
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1].startswith("srun --nodes=1 --ntasks=1 --ntasks-per-node=1 ")
    assert found.stdout.endswith(f"bash {SCRIPT} --on-node run.max_steps=2\n")
    inside = start("--on-node", **ONE, SLURM_STEP_ID="0", MASTER_ADDR="host7")
    assert inside.stdout.startswith("python -m torch.distributed.run")
    assert {"--master-addr=host7", "--node-rank=0"} < {*inside.stdout.split()}


# --- preflight on the first node ---


def test_a_refusal_ends_the_launch_before_torchrun(start):
    found = start(NNODES="1", PREFLIGHT_ENDS="2")
    assert (found.returncode, found.stdout) == (2, "")
    assert "of preflight" in found.stderr
    assert "no rank was started, for the reason above; PREFLIGHT=none" in found.stderr


def test_a_refusal_on_one_node_ends_a_job_before_the_others_start(start):
    found = start(**JOB, PREFLIGHT_ENDS="2")
    assert found.returncode == 2
    assert found.stdout.count("srun ") == 1 and "--preflight-only" in found.stdout
    inside = start("--on-node", "--preflight-only", **JOB, MASTER_ADDR="host7", PREFLIGHT_ENDS="2")
    assert (inside.returncode, inside.stdout) == (2, "")
    assert start("--on-node", "--preflight-only", **JOB, MASTER_ADDR="host7").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [([], {"PREFLIGHT": "none"}), ([], {"NODE_RANK": "1"}), (["--on-node"], {"SLURM_JOB_ID": "17"})],
)
def test_nothing_is_checked_twice_or_unasked(start, arguments, environment):
    found = start(*arguments, NNODES="2", MASTER_ADDR="host0", PREFLIGHT_ENDS="2", **environment)
    assert found.returncode == 0, found.stderr
    assert "of preflight" not in found.stderr


# --- what is refused ---


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CONTAINER_RUNTIME": "podman", **IMAGE}, "CONTAINER_RUNTIME=podman must be pyxis, docker or none"),
        ({"CONTAINER_RUNTIME": "docker"}, "CONTAINER_RUNTIME=docker needs CONTAINER_IMAGE"),
        ({"CONTAINER_RUNTIME": "pyxis", **IMAGE}, "CONTAINER_RUNTIME=pyxis is a plugin of srun"),
        ({"PREFLIGHT": "yes"}, "PREFLIGHT=yes must be deep or none"),
        ({"CONFIG": "qwen33b"}, "CONFIG: no"),
    ],
)
def test_what_cannot_be_started_is_named(start, environment, words):
    found = start(MASTER_ADDR="host0", NNODES="2", **environment)
    assert (found.returncode, found.stdout) == (2, "")
    assert words in found.stderr


def test_help_and_wrong_options(start):
    found = start("--help")
    assert found.returncode == 0
    for name in SETTINGS:
        assert name in found.stdout or name == "MEGATRON_DAPO_ROOT"
    assert "set -euo" not in found.stdout
    found = start("--dryrun")
    assert found.returncode == 2 and "--dryrun is no option" in found.stderr


def test_a_configuration_of_ones_own(start, tmp_path):
    (tmp_path / "mine.yaml").write_text("run: {max_steps: 1}\n")
    found = start(NNODES="1", CONFIG=str(tmp_path / "mine.yaml"))
    assert found.stdout.split()[-2:] == [str(tmp_path / "mine.yaml"), f"run.dir={ROOT}/runs/mine_dapo"]


@pytest.mark.parametrize("value", ["0", "two", "-1"])
def test_a_wrong_number_of_nodes_is_named(start, value):
    found = start(NNODES=value)
    assert (found.returncode, found.stdout) == (2, "")
    assert f"nnodes='{value}' must be a positive number" in found.stderr
