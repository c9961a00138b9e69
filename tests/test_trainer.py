"""The order in which a run is set up. Without ranks, engines and model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dapo import trainer as trainer_file
from megatron_dapo.config import RunConfig
from megatron_dapo.trainer import Trainer


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What a Trainer of rank 0 does to its parts, which are all fakes."""
    done: list[str] = []

    def note(event: str, result: Any = None) -> Any:
        done.append(event)
        return result

    channel = SimpleNamespace(share=lambda value=None: value, connection=lambda: None)
    fakes = {"rank": 0, "channel": channel, "control": None, "device": SimpleNamespace(type="cpu")}
    session: Any = SimpleNamespace(**fakes, hosts=lambda: ["here"])
    service = SimpleNamespace(
        wait_ready=lambda: note("engines are up"), fall_asleep=lambda: note("engines sleep")
    )
    controller = SimpleNamespace(
        service=service,
        reporter=SimpleNamespace(message=lambda text: None),
        take_over=lambda step, resumed: note("rank 0 takes over"),
    )
    monkeypatch.setattr(trainer_file.session, "start", lambda layout, backend: session)
    monkeypatch.setattr(trainer_file.checkpoint, "choose", lambda *of: (None, None))
    monkeypatch.setattr(trainer_file, "start_engines", lambda *of: note("engines start", (controller, None)))
    policy = SimpleNamespace(spec=None)
    monkeypatch.setattr(trainer_file, "Policy", lambda *of: note("the policy is built", policy))
    monkeypatch.setattr(trainer_file, "make_publisher", lambda *of: None)
    return done


@pytest.mark.parametrize(
    ("sleep", "between"),
    [
        ("false", []),  # the policy is built while they load
        ("true", ["engines are up", "engines sleep"]),  # vLLM's check of free memory does not meet the policy
    ],
)
def test_engines_start_before_the_policy_is_built(events, sleep, between):
    overrides = ["model.path=model", "sampling.max_age=0", f"rollout.sleep={sleep}"]
    Trainer(RunConfig.load(None, overrides), backend=None).build()  # type: ignore[arg-type]
    assert events == ["engines start", *between, "the policy is built", "rank 0 takes over"]
