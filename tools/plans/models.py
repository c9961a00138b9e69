"""Folders of models that are planned for: there may be none but the config.json that is kept here."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_dapo.errors import UserError

MODEL_CONFIGS = Path(__file__).parents[1] / "model_configs"


@contextlib.contextmanager
def model_folder(path: str) -> Iterator[Path]:
    """The folder `path`, or one made of the config.json that is kept here for a model of that name."""
    if (Path(path) / "config.json").is_file():
        yield Path(path)
        return
    known = MODEL_CONFIGS / f"{Path(path).name}.json"
    if not known.is_file():
        names = ", ".join(sorted(file.stem for file in MODEL_CONFIGS.glob("*.json")))
        raise UserError(
            f"model.path={path} is no folder with a config.json here, and none is kept for "
            f"{Path(path).name}, only for {names}; give a folder (config.json and tokenizer are enough)"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(known, folder / "config.json")
        (folder / "tokenizer.json").write_text("{}")  # is not read
        yield folder
