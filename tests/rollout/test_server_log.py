"""What is quoted of a server's log: root causes, not the exceptions that pass them on."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dapo.rollout.server_log import quote_log, root_causes

RECORDED = Path(__file__).with_name("log_of_head_dim_12.txt").read_text().splitlines()


def test_a_recorded_end_names_its_root_cause_and_nothing_else():
    """A model with 12-dimensional heads on a CPU, vLLM 0.32: the server said "see stack trace (above)"."""
    cause = "RuntimeError: Unsupported CPU attention configuration: head_dim=12 isa=1 kv_cache_idx=0"
    assert root_causes(RECORDED) == [cause]
    quoted = quote_log(RECORDED, Path("run/logs/engine_0.log")).splitlines()
    assert quoted[:2] == [f"  | {cause}", "End of run/logs/engine_0.log:"]
    assert len(quoted) == 22 and not any("leaked" in line for line in quoted)


CORE = "(EngineCore pid=5) ERROR 11-24 22:50:54 [core.py:1512] "
API = "(APIServer pid=4) ERROR 11-24 22:50:55 [launcher.py:9] "


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            [
                f"{CORE}ValueError: rope_scaling is odd",
                "RuntimeError: Engine core initialization failed. See root cause above. Failed core: {}",
            ],
            ["ValueError: rope_scaling is odd"],
        ),
        (
            ["RuntimeError: Engine core initialization failed. See root cause above."],
            ["RuntimeError: Engine core initialization failed. See root cause above."],  # better than nothing
        ),
        (
            [f"{CORE}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"],
            ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"],
        ),
        (
            [f"{CORE}KeyError: 'a'", f"{CORE}KeyError: 'a'", f"{API}KeyError: 'b'"],
            ["KeyError: 'a'", "KeyError: 'b'"],
        ),
        ([f'{CORE}    raise ValueError("text of a program")', "INFO: ValueError: x"], []),
        (["(APIServer pid=4) WARNING 11-24 22:50:54 [a.py:1] ValueError: only a warning"], []),
        ([f"{CORE}Error{i}Exception: {i}" for i in range(9)], [f"Error{i}Exception: {i}" for i in range(4)]),
        ([], []),
    ],
)
def test_root_causes(lines, expected):
    assert root_causes(lines) == expected


def test_an_empty_log_is_said():
    assert quote_log([], Path("x.log")) == "End of x.log:\n  | (empty)"
