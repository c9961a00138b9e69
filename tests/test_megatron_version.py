"""The suite tests the megatron-core it says it tests: the lock's, or the one given to tests/run.sh."""

from __future__ import annotations

import os
import re
from pathlib import Path

from support.ranks import run_ranks

ROOT = Path(__file__).parents[1]


def test_ranks_import_it():
    asked = os.environ.get("MEGATRON_CORE_UNDER_TEST")
    locked = re.search(r"^megatron-core==(\S+)$", (ROOT / "requirements-cpu.txt").read_text(), re.MULTILINE)
    assert locked
    assert run_ranks("support.jobs_policy:megatron_version", 1) == [asked or locked[1]]
