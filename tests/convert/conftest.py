from __future__ import annotations

import pytest
from support.quantised import Exports


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> Exports:
    return Exports(tmp_path_factory.mktemp("quantised"))
