"""No step is lost, doubled or half-written, and each console shows what it should."""

from __future__ import annotations

import io
import json
import math
import sys
import types

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.report import sinks
from megatron_dapo.report.sinks import Reporter


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
    lines = {p.name: len(p.read_text().splitlines()) for p in tmp_path.iterdir()}
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


# --- console ----------------------------------------------------------------------------

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


def test_plain_lines_are_rare_and_hold_no_control_codes(tmp_path, monkeypatch):
    now, stream = [100.0], io.StringIO()
    monkeypatch.setattr(sinks.time, "monotonic", lambda: now[0])
    reporter = make_reporter(tmp_path, stream=stream)
    for second in range(70):  # 31 and 61 seconds: two lines
        now[0] = 101.0 + second
        reporter.progress("collect", second, 512, tokens_per_s=3812, pass_rate=0.4142)
    reporter.progress("update", 1, 8)  # a new stage is quiet at first
    reporter.record(0, METRICS)
    reporter.message("done [1/2]")
    assert stream.getvalue().splitlines() == [
        "collect 30/512 (3,812 tokens/s, 0.414 pass rate)",
        "collect 60/512 (3,812 tokens/s, 0.414 pass rate)",
        sinks.step_line(0, METRICS),
        "done [1/2]",
    ]


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_terminal_shows_the_stage_and_keeps_the_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream, described = FakeTerminal(), []
    describe = sinks._describe
    monkeypatch.setattr(sinks, "_describe", lambda info: described.append(info) or describe(info))
    reporter = make_reporter(tmp_path, stream=stream)
    for done in range(1, 1001):
        reporter.progress("collect", done, 1000, tokens_per_s=3812)
    reporter.message("engine 1 restarted [bold]")
    reporter.progress("update", 3, 8)
    reporter.record(0, METRICS)
    reporter.close()
    text = stream.getvalue()
    assert "collect" in text and "1000/1000" in text and "3,812 tokens/s" in text
    assert "engine 1 restarted [bold]\n" in text
    assert "update" in text and "3/8" in text
    assert sinks.step_line(0, METRICS) + "\n" in text
    assert len(described) < 50  # throttled
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is visible again


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
