"""No step is lost, doubled or half-written, and each console shows what it should."""

from __future__ import annotations

import io
import json
import math
import sys
import types

import pytest
from support.samples import make_group, make_prompt

from megatron_dapo.config import RunConfig
from megatron_dapo.report import sinks
from megatron_dapo.report.rollouts import load_groups, rollout_path
from megatron_dapo.report.sinks import Reporter
from megatron_dapo.types import Collected, GroupFacts


def make_config(**report) -> RunConfig:
    return RunConfig.make({"model": {"path": "tiny"}, "report": report})


def make_reporter(run_dir, resume_step=None, stream=None, **report) -> Reporter:
    return Reporter(run_dir, make_config(**report), resume_step, stream=stream or io.StringIO())


def steps(run_dir) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def record(run_dir, first: int, last: int, resume_step: int | None) -> None:
    reporter = make_reporter(run_dir, resume_step)
    for step in range(first, last):
        reporter.record(step, {"policy/loss": step / 3})
    reporter.close()


# --- metrics.jsonl ----------------------------------------------------------------------


def test_every_step_is_on_disk_at_once_and_exact(tmp_path):
    reporter = make_reporter(tmp_path / "run")
    reporter.record(0, {"policy/loss": 0.1 + 0.2, "bad": math.nan, "worse": -math.inf})
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert line.endswith("\n") and "NaN" not in line
    assert json.loads(line) == {"step": 0, "policy/loss": 0.1 + 0.2, "bad": None, "worse": None}


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', '{"step": 6, "policy/loss": 1.0}'])
def test_resuming_drops_the_steps_that_run_again(tmp_path, tail):
    record(tmp_path, 0, 6, None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    record(tmp_path, 4, 7, 4)
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6]


def test_a_cut_last_line_is_dropped_even_after_the_resumed_step(tmp_path):
    record(tmp_path, 0, 2, None)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2')
    record(tmp_path, 2, 4, 5)
    assert steps(tmp_path) == [0, 1, 2, 3]


def test_a_complete_last_line_without_its_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "policy/loss": 1.0}')
    record(tmp_path, 1, 2, 1)
    assert steps(tmp_path) == [0, 1]


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"policy/loss": 1}\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        make_reporter(tmp_path, 2)


def test_a_new_run_in_an_old_folder_keeps_the_old_numbers(tmp_path):
    for length in (3, 2, 1):
        record(tmp_path, 0, length, None)
    assert steps(tmp_path) == [0]
    lines = {p.name: len(p.read_text().splitlines()) for p in tmp_path.glob("metrics*")}
    assert lines == {"metrics.0.jsonl": 3, "metrics.1.jsonl": 2, "metrics.jsonl": 1}


def test_a_step_is_recorded_once_and_in_order(tmp_path):
    reporter = make_reporter(tmp_path)
    reporter.record(3, {})
    for step in (3, 2):
        with pytest.raises(ValueError, match=f"step {step} comes after step 3"):
            reporter.record(step, {})
    reporter.close()
    with pytest.raises(ValueError, match="step 3 comes after step 3"):
        make_reporter(tmp_path, 4).record(3, {})
    assert steps(tmp_path) == [3]


METRICS = {
    "policy/loss": -0.00123456,
    "policy/grad_norm": 1.5,
    "time/step": 12.34,
    "response/length_mean": 245.2,
    "accuracy/mean": 0.5,
    "reward/mean": -0.25,
    "other": 7.0,
}


def test_the_line_of_a_step():
    assert sinks.step_line(3, METRICS) == (
        "step 3 | accuracy 0.500 | reward -0.250 | loss -0.001235 | grad norm 1.5 | length 245.2 | 12.3 s"
    )
    assert (
        sinks.step_line(4, {"eval/accuracy": 0.25, "policy/loss": math.nan})
        == "step 4 | eval 0.250 | loss +nan"
    )


# --- facts, rollouts, engines -----------------------------------------------------------

PHASES = [("rollout", 10.0, 14.0), ("update", 14.0, 15.0), ("sync", 15.0, 16.0)]


def collected() -> Collected:
    groups = [make_group(make_prompt(i), correct=i, size=2) for i in range(2)]
    sampled = tuple(GroupFacts.of(g, v) for g, v in zip(groups, ("all_wrong", "accepted"), strict=True))
    return Collected(groups=(groups[1],), sampled=sampled, counts={})


def test_facts_are_written_always_and_cut_back_as_metrics_are(tmp_path):
    for first, last, resume_step in ((1, 5, None), (3, 6, 3)):
        reporter = make_reporter(tmp_path, resume_step)
        for step in range(first, last):
            reporter.facts(step, collected(), began=9.0 + first, phases=PHASES, trained_tokens=2)
        reporter.close()
    lines = [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["began"]) for line in lines] == [(1, 10), (2, 10), (3, 12), (4, 12), (5, 12)]
    assert not (tmp_path / "trace.json").exists()


def test_rollouts_are_on_disk_after_closing_and_nothing_is_written_when_switched_off(tmp_path):
    for folder, rollouts in (("on", True), ("off", False)):
        reporter = make_reporter(tmp_path / folder, rollouts=rollouts)
        assert reporter.rollouts(1, collected().groups, {"num_updates": 3}) < 1
        reporter.close()
    groups, header = load_groups(rollout_path(tmp_path / "on", 1))
    assert groups == list(collected().groups) and header["meta"] == {"num_updates": 3}
    assert not (tmp_path / "off" / "rollouts").exists()


def test_engines_are_measured_from_what_fleet_was_told_and_forgotten_with_the_facts(tmp_path, monkeypatch):
    now = [10.0]
    monkeypatch.setattr(sinks.time, "monotonic", lambda: now[0])
    reporter = make_reporter(tmp_path, trace=True)
    states = {"engine_0": "ready", "engine_1": "ready"}
    for when, running in ((10, {"engine_0": 4, "engine_1": 4}), (13, {"engine_0": 4}), (14, {})):
        now[0] = when
        reporter.fleet(states, running, 0)
    measured = reporter.engine_metrics(PHASES)
    assert measured["engines/idle_tail"] == pytest.approx(1 / 12)  # one of two engines, 1 s of 6 s
    assert measured["engines/idle_trainer"] == measured["engines/idle_sync"] == pytest.approx(2 / 12)
    reporter.facts(1, collected(), began=10.0, phases=PHASES, trained_tokens=2)
    reporter.facts(2, collected(), began=17.0, phases=[("rollout", 17.0, 18.0)], trained_tokens=2)
    reporter.close()
    text = (tmp_path / "trace.json").read_text()
    assert text.count('"running sequences"') == 6  # each sample once, for both engines
    assert reporter.engine_metrics([("rollout", 16.0, 18.0)])["engines/idle_tail"] == 1  # as it was left


# --- optional sinks ---------------------------------------------------------------------


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, resume_step, value in ((0, 5, None, 1.0), (3, 6, 3, 2.0)):
        reporter = make_reporter(tmp_path, resume_step, tensorboard=True)
        for step in range(first, last):
            reporter.record(step, {"policy/loss": value})
        reporter.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("policy/loss")] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
        (5, 2),
    ]


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.calls, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.calls.append(options)
        return self

    def define_metric(self, *args, **options):
        assert (args, options) == (("*",), {"step_metric": "step"})

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize(("key", "mode"), [(None, "offline"), ("secret", None)])
def test_wandb_is_offline_without_a_key_and_resumes_its_run(tmp_path, monkeypatch, key, mode):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    for resume_step in (None, 1, None):
        reporter = make_reporter(tmp_path / "run", resume_step, wandb=True, wandb_project="mine")
        reporter.record(resume_step or 0, {"policy/loss": 0.5})
        reporter.close()
    first, resumed, fresh = wandb.calls
    assert first["mode"] == mode and first["project"] == "mine" and first["name"] == "run"
    assert first["config"]["model"]["path"] == "tiny"
    assert resumed["id"] == first["id"] != fresh["id"]
    assert wandb.logged == [
        {"step": 0, "policy/loss": 0.5},
        {"step": 1, "policy/loss": 0.5},
        {"step": 0, "policy/loss": 0.5},
    ]
    assert wandb.finished == 3


@pytest.mark.parametrize(
    ("option", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, option, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"report.{option}=true needs `pip install {option}`"):
        make_reporter(tmp_path, **{option: True})
