"""The Python API: a script without a __main__ guard trains."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.timeout(1800)


def test_a_plain_script_trains(finished):
    assert finished.status == 0 and finished.gone, finished.log
    assert finished.log.count("script starts") == 1
    assert f"returned {finished.run_dir}" in finished.log
    assert finished.metrics[1]["update"] == 1 and finished.metrics[1]["policy/grad_norm"] > 0
    assert (finished.run_dir / "hf" / "config.json").exists()
