"""Reading problems: every kind of source alike, errors that name the row and the remedy."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_dapo.config import DataConfig
from megatron_dapo.data import rows as rows_module
from megatron_dapo.data.rows import Row, load_rows, load_sources
from megatron_dapo.errors import UserError

ROWS = [Row(f"q{i}", str(i)) for i in range(5)]


def write_lines(path, *lines) -> str:
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


GOOD = [
    {"problem": "1+1", "solution": 2},
    {"problem": "half", "solution": 0.5},
    {"problem": "x", "solution": "\\pi"},
]
GOOD_ROWS = [Row("1+1", "2"), Row("half", "0.5"), Row("x", "\\pi")]


def test_every_source_gives_the_same_rows(tmp_path):
    text = [{**row, "solution": str(row["solution"])} for row in GOOD]
    jsonl = write_lines(tmp_path / "rows.jsonl", *map(json.dumps, GOOD[:2]), "", json.dumps(GOOD[2]))
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(text), parquet)
    dataset = datasets.Dataset.from_list(text).with_format("numpy")
    for source in (jsonl, parquet, GOOD, dataset):
        assert load_rows(source, "problem", "solution") == GOOD_ROWS


def test_long_sources_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "READ_ROWS", 2)
    table = {"prompt": [f"q{i}" for i in range(5)], "answer": list(range(5))}
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    for source in (path, datasets.Dataset.from_dict(table).with_format("numpy")):
        assert load_rows(source, "prompt", "answer") == ROWS
    pyarrow.parquet.write_table(pyarrow.table({**table, "answer": ["0", "1", "2", None, "4"]}), path)
    with pytest.raises(UserError, match="row 3: 'answer' must be text or a number, got None"):
        load_rows(path, "prompt", "answer")


def test_an_integer_read_as_float_is_still_the_integer():
    assert load_rows([{"prompt": "a", "answer": 42.0}], "prompt", "answer")[0].answer == "42"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", ', r"rows\.jsonl, line 2: not a JSON object"),
        pytest.param(
            "[" * 5000 + "]" * 5000, r"line 2: not a JSON object on one line \(maximum rec", id="deep"
        ),
        pytest.param(
            '{"prompt": "a", "answer": ' + '{"a":' * 5000 + "1" + "}" * 5001,
            r"rows\.jsonl, line 2: not a JSON object on one line \(maximum recursion depth",
            id="deep answer",
        ),
        ('{"prompt": "\\ud800", "answer": "1"', r"line 2: not a JSON object"),
        ("[1, 2]", r"line 2: a row is an object .* got list"),
        (
            '{"Prompt": "a", "answer": "1"}',
            r"line 2: no key 'prompt' .* among \['Prompt', 'answer'\]; did you mean data.prompt_key=Prompt",
        ),
        ('{"prompt": "a", "label": "1"}', r"line 2: no key 'answer' .*data.answer_key="),
        ('{"prompt": "  ", "answer": "1"}', r"line 2: 'prompt' is empty"),
        (
            '{"prompt": [{"role": "user"}], "answer": "1"}',
            r"line 2: 'prompt' must be text, got list; .*--prompt-path prompt.0.content",
        ),
        ('{"prompt": "a", "answer": null}', r"line 2: 'answer' must be text or a number, got None"),
        ('{"prompt": "a", "answer": true}', r"line 2: 'answer' must be text or a number, got True"),
        ('{"prompt": "a", "answer": NaN}', r"line 2: 'answer' is nan"),
        ('{"prompt": "a", "answer": ""}', r"line 2: 'answer' is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "rows.jsonl", '{"prompt": "good", "answer": "1"}', line)
    with pytest.raises(UserError, match=message) as caught:
        load_rows(path, "prompt", "answer")
    assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = Path(write_lines(tmp_path / "rows.jsonl", '{"prompt": "a", "answer": "1"}'))

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # the suite may run as root, who may read everything
    with pytest.raises(
        UserError, match=r"rows\.jsonl cannot be read \(Permission denied\); make it readable"
    ):
        load_rows(path, "prompt", "answer")


def test_a_bad_file_is_named(tmp_path):
    def check(name: str, message: str, **options) -> None:
        with pytest.raises(UserError, match=message):
            load_rows(tmp_path / name, "prompt", "answer", **options)

    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.csv").touch()
    (tmp_path / "text.parquet").write_text("hello")
    pyarrow.parquet.write_table(pyarrow.table({"promt": ["a"], "answer": ["1"]}), tmp_path / "keys.parquet")
    check("missing.jsonl", r"data\.path=.*missing\.jsonl does not exist")
    check("missing.jsonl", r"^evaluation\.path=", field="evaluation.path")
    check("empty.jsonl", r"empty\.jsonl has no rows")
    check("rows.csv", r"ends in '\.csv'; give a \.jsonl")
    check("text.parquet", r"text\.parquet cannot be read as Parquet")
    check("keys.parquet", r"keys\.parquet, row 0: no key 'prompt' .*did you mean data.prompt_key=promt")
    with pytest.raises(UserError, match="the given list has no rows"):
        load_rows([], "prompt", "answer")
    with pytest.raises(UserError, match="row 0: no key 'prompt'"):
        load_rows(datasets.Dataset.from_dict({"a": ["b"]}), "prompt", "answer")


# --- rules and several sources ------------------------------------------------------------


def test_a_row_may_name_its_reward_rule(tmp_path):
    """Also where other rows of the file do not, and where no row does."""
    rows = [{"prompt": "a", "answer": "1", "rule": "choice"}, {"prompt": "b", "answer": "2", "rule": None}]
    expected = [("a", "1", "choice"), ("b", "2", None)]
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    jsonl = write_lines(tmp_path / "rows.jsonl", json.dumps(rows[0]), '{"prompt": "b", "answer": "2"}')
    for source in (jsonl, parquet, rows, datasets.Dataset.from_list(rows)):
        found = load_rows(source, "prompt", "answer", rule_key="rule")
        assert [(row.prompt, row.answer, row.rule) for row in found] == expected
        assert load_rows(source, "prompt", "answer", rule_key="other")[0].rule is None
        assert load_rows(source, "prompt", "answer")[0].rule is None


@pytest.mark.parametrize("rule", ["", 3, ["dapo"]])
def test_a_rule_that_is_no_name_is_named(rule):
    with pytest.raises(UserError, match=r"row 0: 'kind' \(data.rule_key\) must name a reward rule, got"):
        load_rows([{"prompt": "a", "answer": "1", "kind": rule}], "prompt", "answer", rule_key="kind")


def test_each_rule_is_checked_once_where_it_is_named_first(tmp_path):
    lines = [
        {"prompt": "a", "answer": "1"} | ({"kind": rule} if rule else {}) for rule in ("", "x", "y", "x")
    ]
    path = write_lines(tmp_path / "rows.jsonl", *map(json.dumps, lines))
    checked: list[tuple[str, str]] = []
    load_rows(path, "prompt", "answer", rule_key="kind", check_rule=lambda *named: checked.append(named))
    where = "{path}, line {line}: 'kind' (data.rule_key)"
    assert checked == [("x", where.format(path=path, line=2)), ("y", where.format(path=path, line=3))]


# --- other fields -------------------------------------------------------------------------


def test_the_other_fields_of_a_row_are_kept_whatever_the_source(tmp_path):
    rows = [{"prompt": "a", "answer": "1", "tests": [1, {"x": "\u00bd"}], "level": None}]
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**rows[0], "tests": [1, 2]}]), parquet)
    jsonl = write_lines(tmp_path / "rows.jsonl", json.dumps(rows[0]))
    for source in (jsonl, rows):
        [row] = load_rows(source, "prompt", "answer")
        assert json.loads(row.fields) == {"tests": [1, {"x": "\u00bd"}], "level": None}
    for source in (parquet, datasets.Dataset.from_parquet(str(parquet))):
        [row] = load_rows(source, "prompt", "answer")
        assert json.loads(row.fields) == {"tests": [1, 2], "level": None}


def test_a_row_without_other_fields_keeps_nothing():
    assert load_rows([{"q": "a", "a": "1"}], "q", "a") == [Row("a", "1", None, "")]


def test_what_json_does_not_know_becomes_text():
    day = datetime.date(2026, 1, 2)
    [row] = load_rows([{"prompt": "a", "answer": "1", "day": day}], "prompt", "answer")
    assert json.loads(row.fields) == {"day": "2026-01-02"}


def test_sources_have_names_and_may_have_keys_of_their_own(tmp_path):
    first = write_lines(tmp_path / "easy.jsonl", '{"prompt": "a", "answer": "1"}')
    second = write_lines(tmp_path / "other.jsonl", '{"question": "b", "label": "2"}')
    keys = {"prompt_key": "question", "answer_key": "label"}
    data = DataConfig(sources=[{"path": first}, {"path": second, "name": "hard", **keys}])
    assert load_sources(data) == {"easy": [Row("a", "1")], "hard": [Row("b", "2")]}
    assert load_sources(DataConfig(path=first)) == {None: [Row("a", "1")]}
    data = DataConfig(sources=[{"path": first}, {"path": "gone.jsonl"}])
    with pytest.raises(UserError, match=r"data.sources\[1\].path=gone.jsonl does not exist"):
        load_sources(data)
