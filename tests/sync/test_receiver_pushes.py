"""Publisher, exchange and a real receiver, each as in a run: a slow receiver, one that is too slow, a damaged
chunk."""

from __future__ import annotations

from typing import Any

import pytest
from support.ranks import run_ranks
from support.receiving import make_two


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pushes")
    models = [str(model) for model in make_two(folder, "qwen2", tied=True)]
    return run_ranks("support.jobs_receiver:run", 1, folders=models, folder=str(folder))[0]


def test_a_slow_receiver_reads_every_chunk_before_its_memory_is_filled_anew(found):
    assert found["first"]["committed"] == found["slow"]["committed"] == ["real", "other"]
    assert found["first"]["as_loaded"].keys() == found["load"].keys()
    assert all(found["load"][name] != digest for name, digest in found["first"]["as_loaded"].items())
    assert found["slow"]["as_loaded"] == found["load"]


def test_a_damaged_chunk_costs_its_replica_the_push_and_nobody_else(found):
    assert found["damaged"]["committed"] == ["other"]
    [failure] = found["damaged"]["failures"]
    assert failure.startswith("real failed while it received weights: ValueError: the worker of tp rank 0")
    assert failure.endswith("of a chunk of weight update 2 are not those that were sent")
    assert found["again"]["committed"] == ["real", "other"]
    assert found["again"]["as_loaded"] == found["load"]


def test_a_receiver_that_is_too_slow_is_left_behind_and_catches_up(found):
    assert found["too slow"]["committed"] == ["other"]
    assert found["too slow"]["failures"] == [
        "real timed out while it received weights: it did not answer within the time-out"
    ]
    assert found["at last"]["committed"] == ["real", "other"]
    assert found["at last"]["as_loaded"] == found["load"]
