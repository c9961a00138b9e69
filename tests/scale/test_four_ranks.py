"""A policy split by tensor and pipeline parallelism over hosts trains as on one host, in every bit: two hosts
with two ranks each, and four with one.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support import host_runs
from support.host_runs import NUM_STEPS, start
from support.hosts import Hosts, reason_against
from support.runs import assert_steps_equal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(reason_against() is not None, reason=reason_against() or ""),
    pytest.mark.timeout(1200),
]
LAYOUT = {"layout__data_parallel": 1, "layout__tensor_parallel": 2, "layout__pipeline_parallel": 2}


@pytest.fixture(scope="module")
def on_one_host(place) -> SimpleNamespace:
    """Four ranks and two engines, as many threads for each as on several hosts."""
    with Hosts(1) as hosts:
        return host_runs.finished(place, hosts[0], "four_ranks", ranks=4, engines=2, **LAYOUT)


@pytest.mark.parametrize(("count", "delta"), [(2, False), (4, False), (2, True)])
def test_ranks_of_one_replica_over_hosts(place, on_one_host, count, delta):
    """tp2 pp2: with two hosts each has a pipeline stage, with four every message leaves its host. Every host
    has an engine.
    """
    name = f"over_{count}_hosts{'_by_deltas' * delta}"
    with Hosts(count) as hosts:
        machines = [hosts[i] for i in range(count)]
        with start(place, machines, name, ranks=4 // count, sync__delta=delta, **LAYOUT) as run:
            assert run.wait() == 0, run.text
            assert run.all_gone()
    assert len(list((place.folder / name / "logs").iterdir())) == count
    assert_steps_equal(place.folder / name, on_one_host, range(1, NUM_STEPS + 1))
