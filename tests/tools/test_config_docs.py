"""docs/configuration.md says what config/ says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field, PositiveInt

from megatron_dapo.config import ObjectiveSection
from megatron_dapo.config.objective import KINDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("config_docs", ROOT / "tools" / "config_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(tool):
    assert tool.main(["--check"]) == 0, "run: python tools/config_docs.py"


def test_check_sees_a_stale_or_missing_page(tool, tmp_path, capsys):
    page = tmp_path / "docs" / "page.md"
    assert tool.main(["--check", "--out", str(page)]) == 1
    assert tool.main(["--out", str(page)]) == 0
    assert tool.main(["--check", "--out", str(page)]) == 0
    page.write_text(page.read_text().replace("`1e-06`", "`1e-05`"))
    assert tool.main(["--check", "--out", str(page)]) == 1
    assert "does not match" in capsys.readouterr().err


class Example(BaseModel):
    size: PositiveInt | None = Field(default=None, description="Size, or not.")
    share: float = Field(default=1e-6, gt=0, le=1, description="a | b")
    bound: float | None = Field(default=10.0, gt=1, description="Bound.")
    kind: Literal["x", "y"] = Field(default="x", description="Kind.")
    pair: tuple[float, float] = Field(default=(0.9, 0.999), description="Pair.")
    name: str = Field(description="Name.")


def test_rows(tool):
    rows = [line for line in tool.page({"example": Example}).splitlines() if line.startswith("| `")]
    assert rows == [
        "| `size` | int > 0 or null | `null` | Size, or not. |",
        "| `share` | float > 0, <= 1 | `1e-06` | a \\| b |",
        "| `bound` | float > 1 or null | `10` | Bound. |",
        '| `kind` | `x` or `y` | `"x"` | Kind. |',
        "| `pair` | tuple[float, float] | `[0.9, 0.999]` | Pair. |",
        "| `name` | str | required | Name. |",
    ]


class Silent(BaseModel):
    told: int = Field(default=1, description="Told.")
    untold: int = 2


class Outer(BaseModel):
    inner: Example | None = Field(default=None, description="Inner.")
    quiet: Silent | None = Field(default=None, description="Quiet.")


def test_the_keys_of_a_nested_section_follow_it(tool):
    keys = [key for key, _ in tool.fields(Outer)]
    assert keys[:3] == ["inner", "inner.size", "inner.share"] and keys[-3:] == [
        "quiet",
        "quiet.told",
        "quiet.untold",
    ]
    assert tool.type_text(Outer.model_fields["inner"]) == "section or null"
    with pytest.raises(ValueError, match=r"no description for outer\.quiet\.untold;"):
        tool.page({"outer": Outer})


class OtherKind(ObjectiveSection):
    kind: Literal["other"] = Field(default="other", description="Kind.")
    beta: float = Field(default=0.5, description="Beta.")


def test_every_kind_of_objective_has_a_table_of_what_differs_from_the_first(tool, monkeypatch):
    monkeypatch.setitem(KINDS, "other", OtherKind)
    page = tool.page(tool.section_types())
    dapo, other = page.partition("## objective (kind=other)")[::2]
    dapo = dapo.partition("\n## objective (kind=dapo)\n")[2].partition("\n## ")[0]
    assert "| `eps_low` |" in dapo and "| `mismatch_low` |" in dapo
    other = other.partition("\n## ")[0]
    assert "| `beta` |" in other and "| `mismatch_low` |" not in other
    without = re.findall(r"As the first kind, without (.*), but:", other)[0].split(", ")
    assert {"`eps_low`", "`advantage`"} <= set(without) and "`mismatch_low`" not in without


def test_a_key_without_description_is_refused(tool):
    with pytest.raises(ValueError, match=r"no description for silent\.untold;"):
        tool.page({"silent": Silent})
