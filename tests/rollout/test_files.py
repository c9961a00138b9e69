"""The limit on open files."""

from __future__ import annotations

import resource

import pytest

from megatron_dapo.errors import UserError
from megatron_dapo.rollout import files


@pytest.fixture
def limits(monkeypatch):
    """This process's limits, as a fake: soft and hard, and what they are set to."""
    values = {"soft": 1024, "hard": 4096}

    def set_limit(which: int, new: tuple[int, int]) -> None:
        assert which == resource.RLIMIT_NOFILE
        values["soft"], values["hard"] = new

    monkeypatch.setattr(files.resource, "getrlimit", lambda which: (values["soft"], values["hard"]))
    monkeypatch.setattr(files.resource, "setrlimit", set_limit)
    return values


def test_the_soft_limit_is_raised_to_what_is_needed(limits):
    files.raise_file_limit(2000)
    assert limits == {"soft": 2000, "hard": 4096}


def test_a_limit_that_is_enough_stays(limits):
    files.raise_file_limit(1024)
    assert limits == {"soft": 1024, "hard": 4096}


def test_an_unlimited_one_stays(limits):
    limits.update(soft=resource.RLIM_INFINITY, hard=resource.RLIM_INFINITY)
    files.raise_file_limit(10**6)
    assert limits["soft"] == resource.RLIM_INFINITY


def test_a_hard_limit_that_is_too_low_is_refused_with_words(limits):
    for check in (files.raise_file_limit, files.check_file_limit):
        with pytest.raises(UserError, match=r"5000 open files.*4096.*ulimit -n.*rollout\.max_concurrency"):
            check(5000)
    files.check_file_limit(4096)
    assert limits["soft"] == 1024
