"""Problems as the files have them: JSONL, Parquet, lists of dicts, `datasets.Dataset`; errors name the row.

rows = load_rows("train.jsonl", "prompt", "answer")
sources = load_sources(config.data)
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dapo.config import DataConfig
from megatron_dapo.errors import UserError

if TYPE_CHECKING:
    import datasets

    RowSource = str | Path | Sequence[Mapping[str, Any]] | datasets.Dataset

READ_ROWS = 4096  # rows of a Parquet file or a Dataset held as Python objects at once
CheckRule = Callable[[str, str], object]  # of a rule's name and of the words for where it is named


@dataclass(frozen=True, slots=True)
class Row:
    """One problem as the file has it: no template, no tokens. rule: the reward rule that it names. fields:
    what the row has beside prompt and answer, as the text of a JSON object; "" for nothing.
    """

    prompt: str
    answer: str
    rule: str | None = None
    fields: str = ""


def load_sources(data: DataConfig, check_rule: CheckRule | None = None) -> dict[str | None, list[Row]]:
    """Every problem of the training data by the name of its source: None for that of data.path."""
    load = partial(load_rows, rule_key=data.rule_key, check_rule=check_rule)
    if not data.sources:
        return {None: load(data.path or "", data.prompt_key, data.answer_key)}
    return {
        source.label: load(
            source.path,
            source.prompt_key or data.prompt_key,
            source.answer_key or data.answer_key,
            f"data.sources[{number}].path",
        )
        for number, source in enumerate(data.sources)
    }


def load_rows(
    source: RowSource,
    prompt_key: str,
    answer_key: str,
    field: str = "data.path",
    rule_key: str | None = None,
    check_rule: CheckRule | None = None,
) -> list[Row]:
    """Read every problem of a JSONL or Parquet file, a list of dicts or a `datasets.Dataset`.

    Numbers become text ("42" for 42 and 42.0). A row may lack `rule_key`. UserError names the file, the line
    and the remedy; `field` is the configuration key that holds the path. `check_rule` is called once for each
    rule that rows name, with the rule and the words for where it is named.
    """
    rows, checked = [], set[str]()
    for where, item in read_items(source, field):
        row = _make_row(item, prompt_key, answer_key, where, rule_key)
        if check_rule and row.rule is not None and row.rule not in checked:
            check_rule(row.rule, f"{where}: {rule_key!r} (data.rule_key)")
            checked.add(row.rule)
        rows.append(row)
    if not rows:
        raise UserError(f"{field}: {_name(source)} has no rows; give it at least one problem")
    return rows


def read_items(source: RowSource, field: str) -> Iterator[tuple[str, Any]]:
    """What each row holds, unchecked, and the words for where it is. UserError for what cannot be read."""
    if isinstance(source, str | Path):
        return _read_file(Path(source), field)
    if isinstance(source, Sequence):
        return ((f"row {index}", item) for index, item in enumerate(source))
    return _read_dataset(source)


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the given {type(source).__name__}"


def _read_file(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"{field}={path} {what}; give a .jsonl or .parquet file (tools/download_data.py makes one)"
        )
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        return _read_parquet(path, field)
    raise UserError(
        f"{field}={path} ends in {path.suffix!r}; give a .jsonl file (one JSON object a line) or a .parquet "
        f"file"
    )


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    with lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8; nested thousands deep
                raise UserError(
                    f"{path}, line {number}: not a JSON object on one line ({error}); correct or delete it"
                ) from error
            yield f"{path}, line {number}", row


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches(READ_ROWS):
                for item in batch.to_pylist():
                    yield f"{path}, row {index}", item
                    index += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{field}={path} cannot be read as Parquet ({error}); download or write it again"
        ) from error


def _read_dataset(dataset: datasets.Dataset) -> Iterator[tuple[str, Any]]:
    columns = dataset.with_format(None)
    for start in range(0, len(columns), READ_ROWS):
        part = columns[start : start + READ_ROWS]
        for index, values in enumerate(zip(*part.values(), strict=True), start=start):
            yield f"row {index}", dict(zip(part, values, strict=True))


def check_keys(item: Any, where: str, options: Mapping[str, str], what: str) -> None:
    """UserError unless the row is an object that has a key for each of `options` (configuration key -> key of
    the row). what: a row is an object with that.
    """
    if not isinstance(item, Mapping):
        raise UserError(f"{where}: a row is an object with {what}, got {type(item).__name__}")
    for option, key in options.items():
        if key not in item:
            nearest = difflib.get_close_matches(key, list(item), n=1, cutoff=0.0)
            remedy = f"did you mean {option}={nearest[0]}?" if nearest else f"a row is an object with {what}"
            raise UserError(f"{where}: no key {key!r} ({option}) among {list(item)}; {remedy}")


def _make_row(item: Any, prompt_key: str, answer_key: str, where: str, rule_key: str | None) -> Row:
    keys = {"data.prompt_key": prompt_key, "data.answer_key": answer_key}
    check_keys(item, where, keys, "a prompt and an answer")
    prompt, answer = item[prompt_key], item[answer_key]
    if not isinstance(prompt, str):
        raise UserError(
            f"{where}: {prompt_key!r} must be text, got {type(prompt).__name__}; "
            f"take the text out of chat messages with tools/download_data.py --prompt-path "
            f"{prompt_key}.0.content"
        )
    if not prompt.strip():
        raise UserError(f"{where}: {prompt_key!r} is empty; delete the row")
    rule = item.get(rule_key) if rule_key else None
    if rule is not None and not (isinstance(rule, str) and rule.strip()):
        raise UserError(
            f"{where}: {rule_key!r} (data.rule_key) must name a reward rule, got {rule!r}; correct it, or "
            f"leave it out of the row"
        )
    others = {key: value for key, value in item.items() if key not in (prompt_key, answer_key)}
    # A text takes less memory than a dictionary. What JSON does not know (a date) becomes text in it.
    fields = json.dumps(others, default=str) if others else ""
    return Row(prompt, _answer_text(answer, answer_key, where), rule, fields)


def _answer_text(answer: Any, answer_key: str, where: str) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(
            f"{where}: {answer_key!r} must be text or a number, got {answer!r}; correct it or set "
            f"data.answer_key"
        )
    if isinstance(answer, float):
        if not math.isfinite(answer):
            raise UserError(
                f"{where}: {answer_key!r} is {answer!r}, no response can match it; correct or delete the row"
            )
        # An integer column with gaps is read as floats; "42.0" would never equal the response "42".
        return str(int(answer)) if answer.is_integer() else str(answer)
    if not str(answer).strip():
        raise UserError(f"{where}: {answer_key!r} is empty, no response can match it; delete the row")
    return str(answer)
