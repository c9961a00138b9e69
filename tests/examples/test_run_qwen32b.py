"""The flagship's script: what it starts on one node, and what it refuses. Nothing is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "run_qwen32b_dapo.sh"
SETTINGS = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE", "MEGATRON_DAPO_ROOT")


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


@pytest.fixture
def start(tmp_path):
    """Run the script with a `python` and an `srun` that print their arguments."""
    for name in ("python", "srun"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'host7\\nhost8\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS and not k.startswith("SLURM_")}

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**clean, "PATH": f"{tmp_path}:{clean['PATH']}", **environment}
        env["PYTHON"] = str(tmp_path / "python")
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True, timeout=30
        )

    return run


def test_one_node(start):
    found = start("run.max_steps=2", NNODES="1", GPUS_PER_NODE="4", MASTER_PORT="1234")
    assert found.returncode == 0, found.stderr
    words = found.stdout.split()
    assert words[:4] == ["python", "-m", "torch.distributed.run", "--nnodes=1"]
    assert words[4:8] == [
        "--nproc-per-node=4",
        "--node-rank=0",
        "--master-addr=127.0.0.1",
        "--master-port=1234",
    ]
    assert words[8:11] == ["-m", "megatron_dapo.train", str(SCRIPT.parent / "configs" / "qwen32b.yaml")]
    assert words[-1] == "run.max_steps=2"


@pytest.mark.parametrize(
    "settings", [{}, {"NNODES": "2", "MASTER_ADDR": "host0"}, {"SLURM_JOB_ID": "1", "SLURM_NNODES": "16"}]
)
def test_several_nodes_are_refused_before_anything_starts(start, settings):
    found = start(**settings)
    assert found.returncode == 2
    assert found.stdout == ""
    assert (
        f"NNODES={settings.get('NNODES', '16')}, but policy ranks on several hosts are not supported yet"
        in found.stderr
    )


def test_dry_run_plans_any_size(start):
    found = start("--dry-run", "run.max_steps=2", NNODES="16")
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[:3] == ["python", "-m", "megatron_dapo.train"]
    assert found.stdout.split()[-2:] == ["run.max_steps=2", "--dry-run"]


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
    assert "512 groups of 16 samples, 16 updates" in found.stdout


def test_slurm_job_starts_a_step(start):
    found = start("run.max_steps=2", SLURM_JOB_ID="1", SLURM_NNODES="1", SLURM_JOB_NODELIST="host[7-8]")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("srun --nodes=1 --ntasks=1 --ntasks-per-node=1 bash ")
    inside = start(
        SLURM_JOB_ID="1", SLURM_STEP_ID="0", SLURM_NNODES="1", SLURM_NODEID="0", MASTER_ADDR="host7"
    )
    assert "--master-addr=host7" in inside.stdout.split()


@pytest.mark.parametrize("value", ["0", "two", "-1"])
def test_a_wrong_number_of_nodes_is_named(start, value):
    found = start(NNODES=value)
    assert (found.returncode, found.stdout) == (2, "")
    assert f"nnodes='{value}' must be a positive number" in found.stderr
