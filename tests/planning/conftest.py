"""Models by the config.json that is kept for planning, and configurations with overrides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.model_spec import read_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def known_model(tmp_path_factory):
    """known_model(name, **changes) -> ModelSpec of tools/model_configs/<name>.json."""

    def make(name: str, **changes):
        folder = tmp_path_factory.mktemp(name)
        values = json.loads((ROOT / "tools" / "model_configs" / f"{name}.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))
        (folder / "tokenizer.json").write_text("{}")
        return read_model(folder)

    return make


@pytest.fixture
def shipped():
    """shipped(name, *overrides) -> the configuration examples/configs/<name>.yaml."""

    def load(name: str, *overrides: str) -> RunConfig:
        return RunConfig.load(ROOT / "examples" / "configs" / f"{name}.yaml", overrides)

    return load
