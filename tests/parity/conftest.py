"""Log-probabilities and exports of several checkpoints, measured once."""

from __future__ import annotations

import pytest
from support.parity_runs import Measured, measure


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> Measured:
    return measure(tmp_path_factory.mktemp("parity"))
