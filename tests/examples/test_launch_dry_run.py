"""`--dry-run` of the flagship's script: what it would start, plainly and under Slurm, and the plan."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.launching import ASYNC, CONFIG, JOB, PLACES, ROOT, SCRIPT, SETTINGS, plan


def test_dry_run_plans_any_size(start):
    found = start("--dry-run", "run.max_steps=2", NNODES="16", NODE_RANK="3", MASTER_ADDR="host0")
    lines = plan(found)
    assert lines["hosts"] == "16 (node 0 is host0), 8 ranks on each, 128 in all"
    assert lines["ports"].startswith("29500 on host0 for torchrun")
    environment = lines["environment of every node"].replace("the interface to host0", "X")
    assert environment == (
        "MASTER_ADDR=host0 MASTER_PORT=29500 CUDA_DEVICE_MAX_CONNECTIONS=1 GLOO_SOCKET_IFNAME=X "
        "NCCL_SOCKET_IFNAME=X"
    )
    nodes = [text for title, text in lines.items() if title.startswith("node ")]
    assert [nodes[0], nodes[15], len(nodes)] == [
        "NODE_RANK=0, RANK=0 to 7",
        "NODE_RANK=15, RANK=120 to 127",
        16,
    ]
    assert "once" not in lines and "#SBATCH" not in found.stdout
    words = lines["on every host"].split()
    assert words[1:5] == ["-m", "torch.distributed.run", "--nnodes=16", "--nproc-per-node=8"]
    assert {"--master-addr=host0", "--master-port=29500", "--node-rank=3", "run.max_steps=2"} < {*words}
    planned, checked = (line.split() for line in found.stdout.splitlines() if line[0] != "#")
    assert planned[1:] == [
        *[f"{ROOT}/tools/plan.py", "run", "--config", str(CONFIG), "run.max_steps=2"],
        *["--nnodes", "16", "--gpus-per-node", "8"],
    ]
    assert checked[:3] == ["python", "-m", "megatron_dapo.train"]
    assert checked[-3:] == ["run.max_steps=2", "--dry-run", "--deep"]


def test_dry_run_shows_which_nodes_serve(start):
    lines = plan(start("--dry-run", **ASYNC))
    assert lines["hosts"] == "16 (node 0 is host0), 8 ranks on each of the first 4, 32 in all"
    assert "--nnodes=4" in lines["on every host with ranks"].split()
    assert lines["on every other host"].endswith("--join host0:29500")
    assert [lines["node 3"], lines["node 4"]] == ["NODE_RANK=3, RANK=24 to 31", "NODE_RANK=4, engines alone"]


def test_dry_run_without_an_address_says_what_is_missing(start):
    assert plan(start("--dry-run"))["hosts"].startswith("16 (node 0 is MASTER_ADDR)")


def test_dry_run_ends_as_what_would_be_refused(start):
    assert start("--dry-run", MASTER_ADDR="host0", PREFLIGHT_ENDS="2").returncode == 2


def test_dry_run_prints_a_script_for_sbatch(start, tmp_path):
    """Without a job, and no address for a plain start. The script does what sbatch of this file would."""
    found = start(
        "--dry-run", "data.template=$A 'b'", NNODES="4", GPUS_PER_NODE="2", CONTAINER_IMAGE="i.sqsh"
    )
    lines = found.stdout.splitlines()
    begin = lines.index("#!/usr/bin/env bash")
    end = next(number for number, line in enumerate(lines) if line.startswith("exec "))
    assert lines[begin + 1].split()[1:4] == ["--job-name=qwen32b_dapo", "--nodes=4", "--ntasks-per-node=1"]
    assert lines[begin + 1].split()[4:] == ["--gpus-per-node=2", "--exclusive"]
    job = tmp_path / "job.sh"
    job.write_text("\n".join(lines[begin : end + 1]))
    environment = {**os.environ, **JOB, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    submitted = subprocess.run(["bash", str(job)], env=environment, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    again = start("data.template=$A 'b'", **JOB, GPUS_PER_NODE="2", CONTAINER_IMAGE="i.sqsh")
    assert submitted.stdout == again.stdout
    assert "--container-image=i.sqsh" in submitted.stdout and "--gpus-per-node=2" in submitted.stdout


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
    assert "GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=the interface" in lines["environment of every node"]


def test_what_sbatch_is_asked_for():
    asked = " ".join(line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH "))
    for word in ("--nodes=16", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive", "--requeue"):
        assert word in asked
    assert "--signal=B:USR1@600" in asked
    assert SCRIPT.read_text().splitlines()[1].startswith("#SBATCH")  # Slurm reads no further than a command


def test_dry_run_for_real(tmp_path):
    """The shipped recipe, planned and checked by the real programs; that needs no weights."""
    shapes = ROOT / "tools" / "model_configs" / "Qwen2.5-32B.json"
    (tmp_path / "config.json").write_text(shapes.read_text())
    (tmp_path / "tokenizer.json").write_text("{}")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+1", "answer": "2"}\n')
    arguments = [f"model.path={tmp_path}", f"data.path={data}", "evaluation.path=null"]
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS and not k.startswith("SLURM_")}
    found = subprocess.run(
        ["bash", str(SCRIPT), "--dry-run", *arguments],
        env={**clean, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr
    text = " ".join(found.stdout.split())
    assert "policy 128 ranks: tp8 x pp4 x dp4 + sequence parallel" in text
    assert "engines 32 engines of tp4" in text
    assert all(f" {phase} " in text for phase in ("memory by phase, GiB generate", "old_logprobs", "update"))
    assert "seconds by stage generate" in text and "a push by link, GB" in text
    assert "tp8 x pp4 x dp4 + sequence parallel = 128 policy ranks" in text
    assert "2 vLLM servers on each of 16 hosts of tensor-parallel size 4" in text
    assert "512 groups of 16 samples, 16 updates" in text
    assert "device: cuda" in text  # it is planned where there is none
