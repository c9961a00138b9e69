"""Sizes by hand, and the warning before a disk is full."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from support.samples import make_spec

from megatron_dapo import disk
from megatron_dapo.config import RunConfig
from megatron_dapo.preflight import Facts


@pytest.fixture
def facts(monkeypatch, tmp_path):
    """facts(free, *overrides) of a model of 1,000,000 parameters in bf16, on a disk with `free` bytes."""
    monkeypatch.setattr(disk, "num_parameters", lambda spec: 1_000_000)

    def make(free: int, *overrides: str) -> Facts:
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        values = ["model.path=m", "model.dtype=bf16", f"run.dir={tmp_path / 'run'}", *overrides]
        config = RunConfig.load(None, values)
        return Facts(
            config=config,
            folder=tmp_path,
            spec=make_spec(),
            layout=config.layout.to_layout(),
            on_cpu=True,
            planned=False,
        )

    return make


def test_bytes_of_a_parameter():
    spec = make_spec()
    number = disk.num_parameters(spec)
    assert disk.export_bytes(spec, "bf16") == 2 * number
    assert disk.checkpoint_bytes(spec, "bf16") == 14 * number
    assert disk.checkpoint_bytes(spec, "fp32") == 16 * number


# Two that stay, one being written, 14 MB each; an export takes 2 MB, two of exports/ stay beside a new one.
@pytest.mark.parametrize(
    "overrides, needed",
    [
        ((), 3 * 14 + 2),
        (("checkpoint.export_hf=false",), 3 * 14),
        (("objective.kind=ppo",), 3 * 28 + 2),  # a value model of the same size
        (("checkpoint.export_every=5",), 3 * 14 + 2 + 3 * 2),
        (("checkpoint.keep=5",), 6 * 14 + 2),
    ],
)
def test_the_warning_comes_one_byte_before_it_is_too_late(facts, caplog, overrides, needed):
    disk.checkpoints_have_room(facts(needed * 10**6, *overrides))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        disk.checkpoints_have_room(facts(needed * 10**6 - 1, *overrides))
    assert "checkpoint.keep=" in caplog.text and "set run.dir to another disk" in caplog.text


def test_checkpoints_that_are_there_already_count(facts, caplog, tmp_path):
    for step in (1, 2):
        (tmp_path / "run" / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    disk.checkpoints_have_room(facts(14 * 10**6 + 2 * 10**6))
    assert not caplog.records


def test_of_another_machine_nothing_is_known(facts, caplog):
    import dataclasses

    disk.checkpoints_have_room(dataclasses.replace(facts(0), planned=True))
    assert not caplog.records
