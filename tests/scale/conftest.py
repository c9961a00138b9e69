"""Two hosts, a model and data for all runs over hosts, and the run on one host that they must equal."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from support import host_runs
from support.hosts import Hosts


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> SimpleNamespace:
    return host_runs.make_place(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Hosts]:
    with Hosts(2) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def finished(place) -> SimpleNamespace:
    """Two data-parallel ranks and two engines on one host."""
    with Hosts(1) as hosts:
        return host_runs.finished(place, hosts[0], "one_host", ranks=2, engines=2)
