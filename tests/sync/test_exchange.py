"""The exchange on four ranks, which stand on one host or on two pretended ones: what rank 0 reads by the
manifests, what is sent, and what memory it takes.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.exchanging import Case
from support.ranks import run_ranks

from megatron_dapo.layout import Layout

ARRANGEMENTS = ("aaaa", "aabb", "abab")
# model, layout, type of the engines, and with which arrangements no host holds the whole model
LAYOUTS = (
    ("dense", Layout(tp=2, pp=2), "float32", {"aabb", "abab"}),
    ("dense", Layout(tp=2, dp=2), "bfloat16", {"abab"}),
    ("tied", Layout(pp=2, dp=2), "float32", {"aabb"}),
    ("tied", Layout(tp=2, pp=2, vpp=2), "bfloat16", {"aabb", "abab"}),
    ("dense", Layout(dp=4), "float32", set()),
    ("experts", Layout(tp=2, sp=True, dp=2, ep=2), "float32", {"abab"}),
)
CASES = {
    f"{model}, {layout.describe()}, {dtype}, {hosts}": Case(
        model=model, layout=layout, hosts=hosts, dtype=dtype
    )
    for model, layout, dtype, _ in LAYOUTS
    for hosts in ARRANGEMENTS
}
ON_GPU = Case(model="dense", layout=Layout(tp=2, pp=2), hosts="aabb", dtype="bfloat16", on_gpu=True)
CASES["as on GPUs"] = ON_GPU
SENDS = [hosts in sending for *_, sending in LAYOUTS for hosts in ARRANGEMENTS]
SENDS.append(True)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_ranks("support.jobs_exchange:run", 4, cases=CASES)[0]


@pytest.mark.parametrize(("name", "sends"), zip(CASES, SENDS, strict=True))
def test_three_pushes_equal_a_direct_fill(found, name, sends):
    of_case = found["cases"][name]
    assert of_case["wrong"] == []
    assert of_case["rounds"] == [of_case["planned rounds"]] * 3 and of_case["planned rounds"] > 2
    assert of_case["sent"] == [of_case["planned"]] * 3
    assert (of_case["planned"] > 0) == sends


def test_an_engine_that_is_left_out_is_sent_nothing_and_catches_up(found):
    left_out = found["left out"]
    of_all, of_others = left_out["planned"]
    assert left_out["untouched"] and left_out["wrong"] == []
    assert left_out["sent"] == [of_all, of_others, of_all] and of_others < of_all


def test_what_goes_to_several_workers_is_packed_and_summed_once(found):
    for of_rank in found["reads"]:
        assert of_rank["packed"] == of_rank["summed"] == of_rank["parcels"] < of_rank["messages"]
        assert of_rank["wrong"] == 0


def test_deltas_are_short_and_lose_nothing(found):
    plain = found["deltas"]["plain"]
    assert plain["wrong"] == [] and plain["sent"][0] == plain["planned"]
    assert max(plain["sent"][1:]) < 0.5 * plain["planned"]


def test_an_engine_that_missed_a_delta_is_sent_everything(found):
    left_out, plain = found["deltas"]["left out"], found["deltas"]["plain"]
    assert left_out["wrong"] == []
    first, second, third = left_out["sent"]
    assert second < plain["sent"][1] < first
    # all but the parcels in which nothing has changed meanwhile
    assert third - plain["sent"][2] > 0.5 * left_out["whole to it"]


def test_a_delta_that_meets_another_image_costs_its_engine_one_push(found):
    damaged = found["deltas"]["damaged"]
    [lost] = {tuple(of_rank.items()) for of_rank in damaged["lost"]}
    assert {name for name, _ in lost} == {"tp1 on c", "tp2 on c"}, "every rank knows it"
    assert all("rank 3 cannot apply a delta: a parcel of" in reason for _, reason in lost)
    assert damaged["again"] == {} and damaged["wrong"] == []
    assert damaged["sent"][2] > damaged["sent"][1]


def test_deltas_that_do_not_pay_are_given_up(found):
    given_up, planned = found["slow deltas"], found["deltas"]["plain"]["planned"]
    assert given_up["wrong"] == []
    first, second, third, fourth = given_up["sent"]
    assert first == second == fourth == planned and third < 0.5 * planned
    assert all(after < before for _, before, after, _ in given_up["memory"]), "the images are gone"


def test_two_chunks_of_a_worker_and_what_is_sent_in_a_round_are_all_the_memory(found):
    for rank, memory in enumerate(found["memory"]):
        chunks = 2 * memory["chunk"]
        assert 0.9 * chunks < memory["extra"] <= chunks + memory["sent in a round"], rank
        assert memory["sent in a round"] <= chunks, rank
        assert memory["grown"] < memory["extra"] + (1 << 20), rank
        assert memory["worker"] > 4 * (memory["extra"] + (1 << 20)), "a copy of all would be noticed"


def test_workers_that_come_and_go_leave_no_memory_and_no_open_files(found):
    workers = found["workers"]
    assert workers["unchanged"], "nothing is made for the same workers again"
    assert workers["wrong"] == []
    for of_rank in workers["left"]:
        assert of_rank[2:4] == of_rank[4:6] == of_rank[6:]


def test_every_rank_learns_what_is_wrong(found):
    errors = found["errors"]
    for text in errors["no memory"]:
        assert text.startswith("UserError: rank 3 cannot share memory with the other processes of host b")
    assert all("the same workers" in text for text in errors["not the same"])
    assert errors["at last"] == ["done"] * 4
