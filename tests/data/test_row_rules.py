"""A reward rule that a row names is looked for when the data are read: of every row of every file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.samples import make_spec

from megatron_dapo import preflight
from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.layout import Layout


def write_rows(path: Path, *rules: str | None) -> Path:
    rows = [{"prompt": "a", "answer": "1"} | ({"rule": rule} if rule else {}) for rule in rules]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(**sections: dict[str, Any]) -> None:
    values = {"model": {"path": "m"}, **sections}
    values["data"] = {"rule_key": "rule", **sections["data"]}
    config = RunConfig.make(values)
    preflight.data_can_be_read(
        preflight.Facts(
            config=config, folder=Path("m"), spec=make_spec(), layout=Layout(), on_cpu=True, planned=False
        )
    )


def test_rules_that_there_are_pass(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", None, "choice", "http://127.0.0.1:1/", "os.path:join")
    read(data={"path": str(file)})


@pytest.mark.parametrize("where", ["path", "sources", "evaluation"])
def test_one_that_there_is_not_is_named_with_its_file_and_line(tmp_path, where):
    good = str(write_rows(tmp_path / "good.jsonl", "dapo"))
    bad = str(write_rows(tmp_path / "bad.jsonl", "choice", None, "choise"))
    sections: dict[str, dict[str, Any]] = {
        "path": {"data": {"path": bad}},
        "sources": {"data": {"sources": [{"path": good}, {"path": bad}]}},
        "evaluation": {"data": {"path": good}, "evaluation": {"path": bad}},
    }[where]
    with pytest.raises(UserError) as error:
        read(**sections)
    assert str(error.value).startswith(f"{bad}, line 3: 'rule' (data.rule_key)='choise' must be 'dapo', ")


def test_a_function_that_cannot_be_imported_is_named_with_its_line(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", None, "no_such_module_of_rules:f")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: .*importing no_such_module_of_rules failed"):
        read(data={"path": str(file)})


def test_without_a_key_no_row_names_a_rule(tmp_path):
    read(data={"path": str(write_rows(tmp_path / "rows.jsonl", "choise")), "rule_key": None})
