"""Bad input: one line, exit code 2, nothing started."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.runs import overrides

pytestmark = pytest.mark.timeout(600)


def gpt2(folder: Path) -> Path:
    (folder / "gpt2").mkdir(exist_ok=True)
    (folder / "gpt2" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    (folder / "gpt2" / "tokenizer.json").write_text("{}")
    return folder / "gpt2"


def without_tokenizer(place: SimpleNamespace) -> Path:
    folder = place.folder / "no_tokenizer"
    if not folder.exists():
        shutil.copytree(place.model, folder, ignore=shutil.ignore_patterns("token*"))
    return folder


def malformed(folder: Path) -> Path:
    path = folder / "malformed.jsonl"
    path.write_text(
        '{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", "answer": "4"}\n{"prompt": "3+3=", "answ'
    )
    return path


def command(place: SimpleNamespace, *more: str, **values) -> subprocess.CompletedProcess:
    """Run the command line to its end; the run folder is new, so that what was written shows."""
    run_dir = place.folder / "refused"
    assert not run_dir.exists()
    arguments = overrides(place.model, place.data, run_dir, **values)
    env = os.environ | {"PYTHONPATH": str(place.data.parent)}
    line = [sys.executable, "-m", "megatron_dapo.train", *arguments, *more]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer__learning_rate": "1"}, ["unknown key optimizer.learning_rate", "optimizer."]),
        ({"data__path": "no/such.jsonl"}, ["data.path=no/such.jsonl does not exist"]),
        ({"data__path": lambda place: malformed(place.folder)}, ["malformed.jsonl, line 3"]),
        (
            {"model__path": lambda place: gpt2(place.folder)},
            ["GPT2LMHeadModel", "Qwen2ForCausalLM", "LlamaForCausalLM"],
        ),
        ({"model__path": without_tokenizer}, ["no tokenizer"]),
        ({"layout__tensor_parallel": "3"}, ["layout.tensor_parallel=3", "4 attention heads", "[1, 2, 4]"]),
        ({"layout__pipeline_parallel": "3"}, ["layout.pipeline_parallel=3", "2 layers"]),
        ({"layout__data_parallel": "3"}, ["16 samples", "layout.data_parallel=3"]),
        (
            {"reward__verifier": "dapo_test_verifiers:fourth"},
            ["dapo_test_verifiers has no function 'fourth'"],
        ),
        ({"rollout__base_port": "busy"}, ["rollout.base_port={port}", "port {port} for engine 0"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_starts(place, values, words):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        values = {name: port if value == "busy" else value for name, value in values.items()}
        result = command(
            place, **{name: value(place) if callable(value) else value for name, value in values.items()}
        )
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word.format(port=port) in lines[0]
    assert not (place.folder / "refused").exists()


def test_a_dry_run_prints_and_starts_nothing(place):
    from megatron_dapo.config import RunConfig

    result = command(place, "--dry-run", layout__tensor_parallel=2, sampling__max_age=3)
    assert result.returncode == 0, result.stderr
    assert (
        "4 policy ranks" in result.stdout
        and "1 vLLM servers" in result.stdout
        and "tp2 x pp1 x dp2" in result.stdout
    )
    resolved = place.folder / "resolved.yaml"
    resolved.write_text(result.stdout)
    assert RunConfig.load(resolved).sampling.max_age == 3
    assert not (place.folder / "refused").exists()
