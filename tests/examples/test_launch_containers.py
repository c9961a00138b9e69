"""The flagship's script in containers: by docker on a node, by pyxis in a job. No image is started."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.launching import IMAGE, JOB, ROOT, SCRIPT, ready

DOCKER = """#!/bin/sh
echo docker "$@" >> "$DOCKER_LOG"
if [ "$1" = kill ]; then touch "$DOCKER_LOG.killed"; exit; fi
if [ -n "$RANKS_READY" ]; then
  trap '' TERM
  touch "$RANKS_READY.0" "$RANKS_READY.1"
  while [ ! -e "$DOCKER_LOG.killed" ]; do sleep 0.05; done
fi
"""


@pytest.fixture
def docker(tmp_path) -> Path:
    """The log of a `docker` that starts nothing; a container ends when it is killed."""
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    return tmp_path / "docker.log"


def test_docker_runs_the_script_once_more_inside(start, docker):
    secret = {"HF_TOKEN": "hf_secret", "NCCL_IB_HCA": "mlx5", "UNRELATED": "1"}
    found = start(
        "run.max_steps=2",
        NNODES="2",
        NODE_RANK="1",
        MASTER_ADDR="host0",
        DOCKER_LOG=str(docker),
        **IMAGE,
        **secret,
    )
    assert found.returncode == 0, found.stderr
    words = docker.read_text().split()
    assert words[:3] == ["docker", "run", "--rm"]
    assert {"--gpus", "all", "--ipc=host", "--network=host", "memlock=-1", "--sig-proxy=false"} < {*words}
    pairs = list(zip(words, words[1:], strict=False))
    mounts = [value for flag, value in pairs if flag == "-v"]
    assert mounts == [f"{ROOT}:{ROOT}", "/data:/data", "/models:/m:ro"]
    passed = {value for flag, value in pairs if flag == "-e"}
    assert {"HF_TOKEN", "NCCL_IB_HCA", "PYTHON", "NODE_RANK=1", "NNODES=2", "MASTER_ADDR=host0"} < passed
    assert not {"UNRELATED", "CONTAINER_IMAGE"} & passed and "hf_secret" not in docker.read_text()
    assert words[words.index("-w") + 1] == str(ROOT)
    assert words[words.index("dapo:1") :] == ["dapo:1", "bash", str(SCRIPT), "run.max_steps=2"]


def test_a_signal_reaches_the_container(launch, docker, tmp_path):
    process = launch(NNODES="1", RANKS_READY=str(tmp_path / "ready"), DOCKER_LOG=str(docker), **IMAGE)
    ready(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0
    run, kill = docker.read_text().splitlines()
    name = run.split()[run.split().index("--name") + 1]
    assert kill == f"docker kill --signal=TERM {name}"


def test_a_job_starts_its_steps_in_containers(start):
    found = start(**JOB, **IMAGE, CONTAINER_WORKDIR="/data")
    mounts = f"{ROOT}:{ROOT},/data:/data,/models:/m:ro"
    wanted = ["--container-image=dapo:1", f"--container-mounts={mounts}", "--container-workdir=/data"]
    for line in found.stdout.splitlines():  # the check on one node, and the run on all
        words = line.split()
        assert words[words.index("bash") - 3 : words.index("bash")] == wanted
    inside = start("--on-node", **JOB, **IMAGE, NNODES="1", MASTER_ADDR="host7")
    assert inside.stdout.startswith("python -m torch.distributed.run")  # pyxis has made the container


def test_a_job_without_pyxis_starts_docker_on_its_nodes(start, docker):
    environment = {**JOB, **IMAGE, "CONTAINER_RUNTIME": "docker", "DOCKER_LOG": str(docker)}
    assert "--container-image" not in start(**environment).stdout
    start("--on-node", **environment, MASTER_ADDR="host7", SLURM_NODEID="1")
    words = docker.read_text().split()
    assert words[words.index("dapo:1") :] == ["dapo:1", "bash", str(SCRIPT), "--on-node"]
    assert "NODE_RANK=1" in words
