"""trace.json loads at any time, and its picture is possible: nothing negative, no lane twice at once."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise

import pytest
from support.samples import make_group, make_prompt

from megatron_dapo.report.engines import Counters
from megatron_dapo.report.trace import Trace
from megatron_dapo.types import GroupFacts, Timing

PHASES = [("rollout", 10.0, 14.0), ("update", 14.0, 15.5), ("sync", 15.5, 16.0)]


def facts(position: int, engine: str, sent: float, answered: float, graded: float) -> GroupFacts:
    group = make_group(make_prompt(position), correct=1, lengths=(3, 5), version=2)
    timed = GroupFacts.of(group, "accepted")
    return GroupFacts(
        **{name: getattr(timed, name) for name in timed.__slots__ if name != "timing"},
        timing=Timing(engine=engine, sent=sent, answered=answered, graded=graded),
    )


STEP = [
    facts(0, "engine_0", 10.0, 12.0, 12.5),
    facts(1, "engine_0", 10.0, 11.0, 12.6),
    facts(2, "engine_0", 11.0, 13.0, 13.1),  # begins when prompt 1 ends: its lane is free
    facts(3, "engine_1", 10.5, 13.5, 13.6),
]


def load(path) -> list[dict]:
    """As Perfetto and Chrome do: the closing bracket is missing, a comma may be left over."""
    return json.loads(path.read_text().rstrip().removesuffix(",") + "]")


def events(path) -> dict[str, list[tuple[str, int, float, float]]]:
    """(name, lane, begin, end) of the slices of each process, seconds since the first event."""
    loaded = load(path)
    named = {e["pid"]: e["args"]["name"] for e in loaded if e["ph"] == "M"}
    first = min(e["ts"] for e in loaded if "ts" in e)
    found = defaultdict(list)
    for e in loaded:
        if e["ph"] == "X":
            begin = (e["ts"] - first) / 1e6
            found[named[e["pid"]]].append((e["name"], e["tid"], begin, begin + e["dur"] / 1e6))
    return found


def test_a_step_is_on_one_time_axis(tmp_path):
    trace = Trace(tmp_path / "trace.json", resumed=False)
    trace.step(7, PHASES, STEP, [])
    shown = events(tmp_path / "trace.json")  # while the run goes on
    trace.close()
    rounded = {
        process: [(name, lane, round(begin, 4), round(end, 4)) for name, lane, begin, end in slices]
        for process, slices in shown.items()
    }
    assert rounded == {
        "trainer": [
            ("step 7", 1, 0.0, 6.0),
            ("rollout", 1, 0.0, 4.0),
            ("update", 1, 4.0, 5.5),
            ("sync", 1, 5.5, 6.0),
        ],
        "weight pushes": [("version 7", 1, 5.5, 6.0)],
        "engine_0": [
            ("prompt 0", 1, 0.0, 2.0),
            ("prompt 1", 2, 0.0, 1.0),
            ("prompt 2", 2, 1.0, 3.0),
        ],
        "engine_1": [("prompt 3", 1, 0.5, 3.5)],
        "grading": [
            ("prompt 1", 1, 1.0, 2.6),
            ("prompt 0", 2, 2.0, 2.5),
            ("prompt 2", 2, 3.0, 3.1),
            ("prompt 3", 1, 3.5, 3.6),
        ],
    }


def test_counters_say_what_runs_and_what_waits(tmp_path):
    trace = Trace(tmp_path / "trace.json", resumed=False)
    trace.step(1, PHASES, [], [Counters(10.0, {"engine_0": 32}, 5), Counters(11.0, {"engine_0": 0}, 0)])
    trace.close()
    counted = [(e["name"], e["args"]["value"]) for e in load(tmp_path / "trace.json") if e["ph"] == "C"]
    assert counted == [
        ("running sequences", 32),
        ("waiting requests", 5),
        ("running sequences", 0),
        ("waiting requests", 0),
    ]


def test_no_lane_holds_two_requests_at_once_also_over_steps(tmp_path):
    """A request that began in one step and ended in a later one is written with the later one."""
    trace = Trace(tmp_path / "trace.json", resumed=False)
    for step in range(5):
        begin = 10.0 * step
        made = [
            facts(
                100 * step + i,
                f"engine_{i % 2}",
                begin + i % 7 - (8 if i % 5 == 0 else 0),
                begin + i % 7 + 1 + i % 3,
                begin + i % 7 + 2 + i % 3,
            )
            for i in range(60)
        ]
        trace.step(step, [("rollout", begin, begin + 10)], made, [])
    trace.close()
    shown = events(tmp_path / "trace.json")
    assert len(shown["engine_0"]) + len(shown["engine_1"]) == len(shown["grading"]) == 300
    for process in ("engine_0", "engine_1", "grading"):
        lanes = defaultdict(list)
        for _, lane, begin, end in shown[process]:
            assert end >= begin
            lanes[lane].append((begin, end))
        for slices in lanes.values():
            assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(sorted(slices)))
        # no more lanes than requests that overlap one another, those of a step before counted as well
        assert len(lanes) <= 40


def test_phases_lie_in_their_step_and_steps_follow_one_another(tmp_path):
    trace = Trace(tmp_path / "trace.json", resumed=False)
    for step in range(1, 4):
        trace.step(step, [(name, b + 7.0 * step, e + 7.0 * step) for name, b, e in PHASES], [], [])
    trace.close()
    open_until, ends = [], []
    for name, _, begin, end in events(tmp_path / "trace.json")["trainer"]:
        while open_until and open_until[-1] <= begin:
            open_until.pop()
        assert not open_until or end <= open_until[-1] + 1e-9
        open_until.append(end)
        if name.startswith("step"):
            ends.append((begin, end))
    assert len(ends) == 3 and all(a[1] <= b[0] for a, b in pairwise(ends))


@pytest.mark.parametrize("cut", [1, 20, 100, 10**6])
def test_a_resumed_run_goes_on_behind_the_last_whole_event(tmp_path, cut):
    path = tmp_path / "trace.json"
    trace = Trace(path, resumed=False)
    trace.step(1, PHASES, STEP, [])
    trace.close()
    whole = path.read_bytes()
    before = len(load(path))
    path.write_bytes(whole[: max(len(whole) - cut, 1)])
    trace = Trace(path, resumed=True)
    trace.step(2, [(name, b + 10.0, e + 10.0) for name, b, e in PHASES], [], [])
    trace.close()
    names = [e["name"] for e in load(path)]
    assert names.count("step 2") == 1 and len(names) <= before + 7
    assert names.count("step 1") == (cut < 10**6)


def test_a_new_run_keeps_the_trace_of_another(tmp_path):
    for step in (1, 2):
        trace = Trace(tmp_path / "trace.json", resumed=False)
        trace.step(step, PHASES, [], [])
        trace.close()
    assert "step 1" in (tmp_path / "trace.0.json").read_text()
    assert "step 2" in (tmp_path / "trace.json").read_text()
