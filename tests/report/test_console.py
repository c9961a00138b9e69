"""Each console shows what it should: rare plain lines in a file, a live line on a terminal."""

from __future__ import annotations

import io

from megatron_dapo.config import RunConfig
from megatron_dapo.report import console
from megatron_dapo.report.sinks import Reporter, step_line

METRICS = {"policy/loss": -0.5, "time/step": 12.34}
STATES = {f"engine_{i}": "ready" for i in range(31)} | {"engine_31": "starting"}
RUNNING = {"engine_0": 4000, "engine_1": 812}
FLEET = "engines 31 ready, 1 starting | 4,812 running, 103 waiting"


def make_reporter(run_dir, stream) -> Reporter:
    config = RunConfig.make({"model": {"path": "tiny"}, "report": {"rollouts": False}})
    return Reporter(run_dir, config, None, stream=stream)


def test_plain_lines_are_rare_and_hold_no_control_codes(tmp_path, monkeypatch):
    now, stream = [100.0], io.StringIO()
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    reporter = make_reporter(tmp_path, stream)
    for second in range(70):  # 31 and 61 seconds: two lines
        now[0] = 101.0 + second
        reporter.progress("collect", second, 512, tokens_per_s=3812, pass_rate=0.4142)
    reporter.progress("update", 1, 8)  # a new stage is quiet at first
    reporter.record(0, METRICS)
    reporter.message("done [1/2]")
    assert stream.getvalue().splitlines() == [
        "collect 30/512 (3,812 tokens/s, 0.414 pass rate)",
        "collect 60/512 (3,812 tokens/s, 0.414 pass rate)",
        step_line(0, METRICS),
        "done [1/2]",
    ]


def test_plain_lines_tell_of_the_fleet_also_while_no_group_ends(tmp_path, monkeypatch):
    now, stream = [100.0], io.StringIO()
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    reporter = make_reporter(tmp_path, stream)
    reporter.fleet(STATES, RUNNING, 103)  # no stage yet: quiet
    reporter.progress("collect", 3, 512)
    for second in range(65):
        now[0] = 100.0 + second
        reporter.fleet(STATES, RUNNING, 103)
    reporter.progress("collect", 512, 512)
    for second in range(65, 130):  # the stage has ended
        now[0] = 100.0 + second
        reporter.fleet(STATES, RUNNING, 103)
    assert stream.getvalue().splitlines() == [f"collect 3/512 | {FLEET}"] * 2


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_terminal_shows_the_stage_and_keeps_the_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream, described = FakeTerminal(), []
    describe = console._describe
    monkeypatch.setattr(console, "_describe", lambda info: described.append(info) or describe(info))
    reporter = make_reporter(tmp_path, stream)
    reporter.fleet(STATES, RUNNING, 103)
    for done in range(1, 1001):
        reporter.progress("collect", done, 1000, tokens_per_s=3812)
    reporter.message("engine 1 restarted [bold]")
    reporter.progress("update", 3, 8)
    reporter.record(0, METRICS)
    reporter.close()
    text = stream.getvalue()
    assert "collect" in text and "1000/1000" in text and "3,812 tokens/s" in text
    assert FLEET in text
    assert "engine 1 restarted [bold]\n" in text
    assert "update" in text and "3/8" in text
    assert step_line(0, METRICS) + "\n" in text
    assert len(described) < 50  # throttled
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is visible again
