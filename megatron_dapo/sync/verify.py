"""Proof that the engines hold what was pushed: digests of every parameter, compared with those of a server
that loaded the exported checkpoint by itself (sync/vllm/digest.py writes both).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_dapo.errors import UserError

FRESH = "fresh"  # the folder of digests of the server that loaded the export
NAMES_IN_ERRORS = 10


class SyncMismatch(UserError):
    """An engine does not hold the weights that were pushed to it."""


def compare_digests(
    digests: Path, engines: Sequence[str], *, tensor_parallel: int, version: int, export: Path
) -> int:
    """Number of parameters compared, over all engines and their tensor-parallel ranks.

    `digests` has one folder per engine name, with what it held after weight push `version`, and one named
    `fresh`, of a server that loaded `export`. SyncMismatch names the parameters that differ.
    """
    compared = 0
    for rank in range(tensor_parallel):
        expected = _read(digests / FRESH / f"tp{rank}-load.json")
        for engine in engines:
            held = _read(digests / engine / f"tp{rank}-v{version}.json")
            names = expected.keys() | held.keys()
            wrong = sorted(name for name in names if expected.get(name) != held.get(name))
            if wrong:
                raise SyncMismatch(
                    f"after weight push {version}, {engine} (tensor-parallel rank {rank}) differs from "
                    f"{export} in {len(wrong)} of {len(expected)} parameters: "
                    f"{', '.join(wrong[:NAMES_IN_ERRORS])}"
                )
            compared += len(expected)
    return compared


def _read(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise SyncMismatch(
            f"{path} is missing: that server wrote no digests; run.verify_sync must be on when it starts"
        )
    return json.loads(path.read_text())
