"""A model and data for all whole runs, and one finished run that the disturbed ones are compared with."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from support.models import make_tiny_model
from support.runs import STEPS, metrics, overrides, started, write_data


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> SimpleNamespace:
    """A tiny model and data for all runs of this file."""
    folder = tmp_path_factory.mktemp("runs")
    model = make_tiny_model(folder / "model", tied=True, max_positions=1024)
    return SimpleNamespace(folder=folder, model=model, data=write_data(folder / "data"))


@pytest.fixture(scope="session")
def finished(place) -> SimpleNamespace:
    """A run of STEPS steps that nothing disturbed, with an evaluation at the beginning and the end."""
    run_dir = place.folder / "finished"
    held_out = place.folder / "held_out.jsonl"
    held_out.write_text(
        "".join(json.dumps({"prompt": f"{i}-1=", "answer": str(i - 1)}) + "\n" for i in range(6))
    )
    extra = {"evaluation__path": held_out, "evaluation__every_steps": STEPS, "checkpoint__every_steps": 1}
    extra |= {"checkpoint__export_every": 1, "checkpoint__keep_exports": 2}
    arguments = overrides(place.model, place.data, run_dir, run__max_steps=STEPS, **extra)
    with started(arguments, place.data, place.folder / "finished.log") as run:
        status = run.wait()
        gone = run.all_gone()
    return SimpleNamespace(
        run_dir=run_dir, status=status, gone=gone, log=run.text, metrics=metrics(run_dir), held_out=held_out
    )
