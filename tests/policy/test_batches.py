"""A step's batch reaches the ranks that train on it, and no others."""

from __future__ import annotations

import pytest
from support.ranks import run_ranks


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 1, 2), pytest.param(1, 2, 2, marks=pytest.mark.slow)])
def test_every_rank_gets_its_part_and_not_a_byte_of_the_others(tp, pp, dp):
    ranks = run_ranks("support.batch_jobs:take_part", tp * pp * dp, tp=tp, pp=pp, dp=dp)
    assert all(rank["same"] for rank in ranks)
    assert {rank["dp_rank"] for rank in ranks} == set(range(dp))
    assert sum(rank["samples"] for rank in ranks) == 12 * tp * pp
    # Rank 0 makes the batch; one byte more and `fresh_N` (bool, one for each sample) is all that comes beside
    # the tokens.
    for number, rank in enumerate(ranks):
        assert rank["received"] == (0 if number == 0 else rank["part"] + rank["samples"])


def test_a_rank_without_samples_gets_an_empty_part():
    ranks = run_ranks("support.batch_jobs:take_part", 2, tp=1, pp=1, dp=2, samples_on_one_rank=True)
    assert all(rank["same"] for rank in ranks)
    assert ranks[1]["samples"] == 0
