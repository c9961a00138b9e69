from __future__ import annotations

import threading

import pytest
from support.engines import Engines
from support.service import Service

from megatron_dapo.rollout import replica


@pytest.fixture(autouse=True)
def no_wait_for_last_words(monkeypatch):
    """Fake servers write nothing into their logs while they end."""
    monkeypatch.setattr(replica, "LOOK_S", 0.0)


@pytest.fixture
def services(tmp_path):
    """Starts services with fakes, ready and at weight version 0; closes them at the end."""
    made = []

    def start(engines: Engines, **sampling) -> Service:
        service = Service(engines, tmp_path, **sampling)
        made.append(service)
        service.start()
        service.wait_ready()
        service.push(0)
        return service

    yield start
    for service in made:
        service.close()
        assert not any(server.is_running for server in service.engines.servers)
    assert "rollout" not in {thread.name for thread in threading.enumerate()}
