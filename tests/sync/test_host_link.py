"""Hosts without ranks: four ranks on two pretended hosts send to processes that carry for hosts x and y. What
arrives, what is sent, and what becomes of a push in which one of them dies or hangs.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.carriers import PHASES
from support.exchanging import Case
from support.jobs_serving import TIMEOUT_S
from support.ranks import run_ranks

from megatron_dapo.layout import Layout

CASES = {
    "beside engines on a": Case(
        model="dense", layout=Layout(tp=2, pp=2), hosts="aabb", engine_hosts="axy", dtype="bfloat16"
    ),
    "x alone": Case(model="tied", layout=Layout(pp=2, dp=2), hosts="abab", engine_hosts="x"),
    "experts": Case(
        model="experts", layout=Layout(tp=2, sp=True, dp=2, ep=2), hosts="aaaa", engine_hosts="xy"
    ),
    "twelve hosts, 24 engines": Case(
        model="dense", layout=Layout(tp=2, pp=2), hosts="aabb", engine_hosts="klmnopqrstuv", dtype="bfloat16"
    ),
    "deltas": Case(
        model="dense",
        layout=Layout(tp=2, pp=2),
        hosts="aabb",
        engine_hosts="axy",
        dtype="bfloat16",
        delta=True,
        changes=0.02,
    ),
}
FAULTS = [f"{phase} kill" for phase in PHASES] + ["answer stop", "connect stop", "send stop"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_ranks("support.jobs_serving:run", 4, cases=CASES, faults=FAULTS)[0]


@pytest.mark.parametrize("name", CASES)
def test_three_pushes_equal_a_direct_fill(found, name):
    of_case = found["cases"][name]
    assert of_case["wrong"] == []
    assert of_case["rounds"] == [of_case["planned rounds"]] * 3 and of_case["planned rounds"] > 2
    first, *others = of_case["sent"]
    assert first == of_case["planned"] > 0
    if CASES[name].delta:
        assert max(others) < 0.5 * first
    else:
        assert others == [first] * 2


def test_only_ranks_that_send_to_a_host_connect_to_it(found):
    assert found["few"] == [1, 1, 1, 0]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_host_that_fails_costs_its_engines_one_push(found, fault):
    of_fault = found["faults"][fault]
    assert of_fault["lost"] == [["tp1 on y", "tp2 on y"]] * 4, "every rank knows it"
    [reason] = of_fault["reasons"]
    assert reason.startswith("y cannot be sent weights (rank ")
    # one wait for an answer, to connect, or in a round; then nobody waits for it any more
    assert of_fault["seconds"] < 2 * TIMEOUT_S
    assert of_fault["again"] == {} and of_fault["wrong"] == []


def test_links_that_come_and_go_leave_no_open_files(found):
    for counts in found["files"]:
        assert counts[1:] == counts[1:2] * 3
