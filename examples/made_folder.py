"""Make a folder once: build it next to its place, stamp it last, move it there in one rename."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAMP = "made_with.json"


def make_folder(folder: Path, arguments: dict[str, Any], build: Callable[[Path], None]) -> bool:
    """Call `build(empty folder)` unless `folder` was already made with the same arguments; True if it was
    built now.

    A folder that holds something else is never replaced: ValueError. An interrupted build leaves `folder` as
    it was.
    """
    stamp = folder / STAMP
    if stamp.is_file():
        if json.loads(stamp.read_text()) == arguments:
            return False
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--out {folder} holds something that this script did not make; remove it or choose another "
            f"folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        unfinished = Path(scratch) / "new"
        unfinished.mkdir()
        build(unfinished)
        (unfinished / STAMP).write_text(json.dumps(arguments, indent=1) + "\n")
        if folder.exists():
            os.rename(folder, Path(scratch) / "old")
        os.rename(unfinished, folder)
    return True


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
