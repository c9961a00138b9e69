"""Problems as the files have them: JSONL, Parquet, lists of dicts, `datasets.Dataset`; errors name the row.

rows = load_rows("train.jsonl", "prompt", "answer")
sources = load_sources(config.data)
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dapo.config import DataConfig
from megatron_dapo.errors import UserError

if TYPE_CHECKING:
    import datasets

READ_ROWS = 4096  # rows of a Parquet file or a Dataset held as Python objects at once


@dataclass(frozen=True, slots=True)
class Row:
    """One problem as the file has it: no template, no tokens. rule: the reward rule that it names."""

    prompt: str
    answer: str
    rule: str | None = None


def load_sources(data: DataConfig) -> dict[str | None, list[Row]]:
    """Every problem of the training data by the name of its source: None for that of data.path."""
    if not data.sources:
        rows = load_rows(data.path or "", data.prompt_key, data.answer_key, rule_key=data.rule_key)
        return {None: rows}
    return {
        source.label: load_rows(
            source.path,
            source.prompt_key or data.prompt_key,
            source.answer_key or data.answer_key,
            f"data.sources[{number}].path",
            rule_key=data.rule_key,
        )
        for number, source in enumerate(data.sources)
    }


def load_rows(
    source: str | Path | Sequence[Mapping[str, Any]] | datasets.Dataset,
    prompt_key: str,
    answer_key: str,
    field: str = "data.path",
    rule_key: str | None = None,
) -> list[Row]:
    """Read every problem of a JSONL or Parquet file, a list of dicts or a `datasets.Dataset`.

    Numbers become text ("42" for 42 and 42.0). A row may lack `rule_key`. UserError names the file, the line
    and the remedy; `field` is the configuration key that holds the path.
    """
    if isinstance(source, str | Path):
        items = _read_file(Path(source), prompt_key, answer_key, field, rule_key)
    elif isinstance(source, Sequence):
        items = ((f"row {index}", item) for index, item in enumerate(source))
    else:
        items = _read_dataset(source, prompt_key, answer_key, rule_key)
    rows = [_make_row(item, prompt_key, answer_key, where, rule_key) for where, item in items]
    if not rows:
        raise UserError(f"{field}: {_name(source)} has no rows; give it at least one problem")
    return rows


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the given {type(source).__name__}"


def _read_file(
    path: Path, prompt_key: str, answer_key: str, field: str, rule_key: str | None
) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"{field}={path} {what}; give a .jsonl or .parquet file (tools/download_data.py makes one)"
        )
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        return _read_parquet(path, prompt_key, answer_key, field, rule_key)
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


def _read_parquet(
    path: Path, prompt_key: str, answer_key: str, field: str, rule_key: str | None
) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_keys(names, prompt_key, answer_key, str(path))
            keys = [prompt_key, answer_key, *([rule_key] if rule_key in names else [])]
            index = 0
            for batch in file.iter_batches(READ_ROWS, columns=keys):
                for item in batch.to_pylist():
                    yield f"{path}, row {index}", item
                    index += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{field}={path} cannot be read as Parquet ({error}); download or write it again"
        ) from error


def _read_dataset(
    dataset: datasets.Dataset, prompt_key: str, answer_key: str, rule_key: str | None
) -> Iterator[tuple[str, Any]]:
    _check_keys(dataset.column_names, prompt_key, answer_key, "the given Dataset")
    keys = [prompt_key, answer_key, *([rule_key] if rule_key in dataset.column_names else [])]
    columns = dataset.select_columns(keys).with_format(None)
    for start in range(0, len(columns), READ_ROWS):
        part = columns[start : start + READ_ROWS]
        for index, values in enumerate(zip(*(part[key] for key in keys), strict=True), start=start):
            yield f"row {index}", dict(zip(keys, values, strict=True))


def _check_keys(keys: Sequence[str], prompt_key: str, answer_key: str, where: str) -> None:
    for option, key in (("data.prompt_key", prompt_key), ("data.answer_key", answer_key)):
        if key not in keys:
            nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
            remedy = (
                f"did you mean {option}={nearest[0]}?"
                if nearest
                else "a row is an object with a prompt and an answer"
            )
            raise UserError(f"{where}: no key {key!r} ({option}) among {list(keys)}; {remedy}")


def _make_row(item: Any, prompt_key: str, answer_key: str, where: str, rule_key: str | None) -> Row:
    if not isinstance(item, Mapping):
        raise UserError(f"{where}: a row is an object with a prompt and an answer, got {type(item).__name__}")
    _check_keys(list(item), prompt_key, answer_key, where)
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
    return Row(prompt, _answer_text(answer, answer_key, where), rule)


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
