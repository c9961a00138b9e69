"""A model and data for all whole runs, and one finished run that the disturbed ones are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.models import make_tiny_model
from support.runs import STEPS, metrics, settings, started, write_data

SCRIPT = """
import json

from megatron_dapo import DAPOTrainer

# No __main__ guard: the ranks must not run this file again.
print("script starts")
rows = [json.loads(line) for line in open({data!r})]
trainer = DAPOTrainer(
    model_name={model!r}, clip_epsilon=0.2, dynamic_sampling=True, max_length=8, overrides={overrides!r}
)
print("returned", trainer.train(rows, epochs=10))
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> SimpleNamespace:
    """A tiny model and data for all runs of this file."""
    folder = tmp_path_factory.mktemp("runs")
    model = make_tiny_model(folder / "model", tied=True, max_positions=1024)
    return SimpleNamespace(folder=folder, model=model, data=write_data(folder / "data"))


@pytest.fixture(scope="session")
def finished(place) -> SimpleNamespace:
    """A run of STEPS steps that nothing disturbed, with an evaluation at the beginning and the end. A script
    starts it; the runs that are compared with it are started from the command line.
    """
    run_dir = place.folder / "finished"
    held_out = place.folder / "held_out.jsonl"
    held_out.write_text(
        "".join(json.dumps({"prompt": f"{i}-1=", "answer": str(i - 1)}) + "\n" for i in range(6))
    )
    extra = {"evaluation__path": held_out, "evaluation__every_steps": STEPS, "checkpoint__every_steps": 1}
    extra |= {"checkpoint__export_every": 1, "checkpoint__keep_exports": 2}
    values = settings(place.model, place.data, run_dir, run__max_steps=STEPS, **extra)
    given = {"model.path", "data.path", "rollout.max_tokens"}  # as arguments
    chosen = {name: str(v) if isinstance(v, Path) else v for name, v in values.items() if name not in given}
    chosen["reward.overlong_cache"] = 0  # as from the command line
    script = place.folder / "script.py"
    script.write_text(SCRIPT.format(model=str(place.model), data=str(place.data), overrides=chosen))
    with started([str(script)], place.data, place.folder / "finished.log", module="") as run:
        status = run.wait()
        gone = run.all_gone()
    return SimpleNamespace(
        run_dir=run_dir, status=status, gone=gone, log=run.text, metrics=metrics(run_dir), held_out=held_out
    )
