"""The prompt stream: rows of a file in a deterministic order, rendered and tokenised when they are reached.

    rows = load_rows("train.jsonl", "prompt", "answer")
    stream = PromptStream(rows, tokenizer, config.data, seed=config.run.seed)
    prompt = stream.next()               # None after the last epoch

A *slot* is a place in the shuffled epochs laid end to end. Slots whose prompt is too long are skipped, so
`slot = position + number of slots skipped so far`: the cursor is a position and the list of skipped slots.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import random
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dapo.config import DataConfig
from megatron_dapo.errors import UserError
from megatron_dapo.types import Prompt

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

READ_ROWS = 4096  # rows of a Parquet file or a Dataset held as Python objects at once


@dataclass(frozen=True, slots=True)
class Row:
    """One problem as the file has it: no template, no tokens."""

    prompt: str
    answer: str


def load_rows(
    source: str | Path | Sequence[Mapping[str, Any]] | datasets.Dataset,
    prompt_key: str,
    answer_key: str,
    field: str = "data.path",
) -> list[Row]:
    """Read every problem of a JSONL or Parquet file, a list of dicts or a `datasets.Dataset`.

    Numbers become text ("42" for 42 and 42.0). UserError names the file, the line and the remedy; `field` is
    the configuration key that holds the path.
    """
    if isinstance(source, str | Path):
        items = _read_file(Path(source), prompt_key, answer_key, field)
    elif isinstance(source, Sequence):
        items = ((f"row {index}", item) for index, item in enumerate(source))
    else:
        items = _read_dataset(source, prompt_key, answer_key)
    rows = [_make_row(item, prompt_key, answer_key, where) for where, item in items]
    if not rows:
        raise UserError(f"{field}: {_name(source)} has no rows; give it at least one problem")
    return rows


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the given {type(source).__name__}"


def _read_file(path: Path, prompt_key: str, answer_key: str, field: str) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"{field}={path} {what}; give a .jsonl or .parquet file (tools/download_data.py makes one)"
        )
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        return _read_parquet(path, prompt_key, answer_key, field)
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


def _read_parquet(path: Path, prompt_key: str, answer_key: str, field: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_keys(file.schema_arrow.names, prompt_key, answer_key, str(path))
            index = 0
            for batch in file.iter_batches(READ_ROWS, columns=[prompt_key, answer_key]):
                for item in batch.to_pylist():
                    yield f"{path}, row {index}", item
                    index += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{field}={path} cannot be read as Parquet ({error}); download or write it again"
        ) from error


def _read_dataset(dataset: datasets.Dataset, prompt_key: str, answer_key: str) -> Iterator[tuple[str, Any]]:
    _check_keys(dataset.column_names, prompt_key, answer_key, "the given Dataset")
    columns = dataset.select_columns([prompt_key, answer_key]).with_format(None)
    for start in range(0, len(columns), READ_ROWS):
        part = columns[start : start + READ_ROWS]
        for index, (prompt, answer) in enumerate(
            zip(part[prompt_key], part[answer_key], strict=True), start=start
        ):
            yield f"row {index}", {prompt_key: prompt, answer_key: answer}


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


def _make_row(item: Any, prompt_key: str, answer_key: str, where: str) -> Row:
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
    return Row(prompt, _answer_text(answer, answer_key, where))


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


class PromptStream:
    """Prompts in the order that (seed, epoch) shuffles them to, endless or `config.epochs` long, resumable at
    any position.

    `position` is the position of the next prompt: it counts delivered prompts over the whole run, without
    gaps. `skipped_long` counts the prompts skipped up to here because they exceed `data.max_prompt_tokens`.
    """

    def __init__(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, seed: int
    ) -> None:
        if not rows:
            raise UserError("data.path has no rows; give it at least one problem")
        self.position = 0
        self._rows, self._tokenizer, self._config, self._seed = rows, tokenizer, config, seed
        self._skipped: list[int] = []
        self._order: tuple[int, Sequence[int]] = (-1, ())  # (epoch, its order)
        self._digest: str | None = None
        self._shots = _few_shot_messages(config)
        if config.chat and not tokenizer.chat_template:
            raise UserError(
                f"data.chat=true but the tokenizer {tokenizer.name_or_path!r} has no chat template; "
                "use an instruct model's tokenizer or set data.chat=false with a data.template"
            )
        _warn_duplicates(rows)

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self._rows)

    @property
    def skipped_long(self) -> int:
        return len(self._skipped)

    @property
    def epoch(self) -> int:
        """Which pass over the data the next prompt belongs to, from 0."""
        return (self.position + len(self._skipped)) // len(self._rows)

    def next(self) -> Prompt | None:
        """The next prompt, None at the end of the last epoch. UserError when a whole pass finds every prompt
        too long.
        """
        limit = self._config.max_prompt_tokens
        for _ in range(len(self._rows)):
            slot = self.position + len(self._skipped)
            epoch, index = divmod(slot, len(self._rows))
            if self._config.epochs is not None and epoch >= self._config.epochs:
                return None
            prompt = self._render(self._epoch_order(epoch)[index])
            if len(prompt.tokens) <= limit:
                self.position += 1
                return prompt
            self._skipped.append(slot)
            if str(self.skipped_long).strip("0") == "1":  # the 1st, 10th, 100th ...
                log.warning(
                    f"data.path row {prompt.row}: {len(prompt.tokens)} tokens exceed "
                    f"data.max_prompt_tokens={limit}; "
                    f"skipped ({self.skipped_long} so far)"
                )
        raise UserError(
            f"data.path: all {len(self._rows)} prompts are longer than data.max_prompt_tokens={limit}; raise "
            f"it "
            "(and batch.max_tokens with it) or shorten data.template and data.few_shot"
        )

    def rewind(self, position: int) -> None:
        """Deliver again from an earlier position (or stay, at the present one)."""
        if not 0 <= position <= self.position:
            raise ValueError(
                f"cannot rewind to position {position}: the stream has delivered positions below "
                f"{self.position}"
            )
        # Skipped slot number i has `skipped[i] - i` prompts before it.
        kept = bisect_left(range(len(self._skipped)), position, key=lambda i: self._skipped[i] - i)
        del self._skipped[kept:]
        self.position = position

    def state(self) -> dict[str, Any]:
        """The cursor as JSON values."""
        return {"position": self.position, "skipped": list(self._skipped), **self._identity()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`. UserError when the data, the seed or shuffling differ: positions would
        mean other prompts.
        """
        remedies = {
            "data": "data.path holds other problems than the run was started with",
            "seed": "run.seed differs from the run's",
            "shuffle": "data.shuffle differs from the run's",
        }
        for key, value in self._identity().items():
            if state[key] != value:
                raise UserError(
                    f"cannot resume the prompt stream: {remedies[key]} ({state[key]!r} then, {value!r} now); "
                    "restore it, or start a new run with another run.dir"
                )
        self.position, self._skipped = state["position"], list(state["skipped"])

    def _identity(self) -> dict[str, Any]:
        if self._digest is None:
            digest = hashlib.sha256()
            for row in self._rows:
                text = f"{len(row.prompt)} {len(row.answer)} {row.prompt}{row.answer}"
                digest.update(text.encode("utf-8", "surrogatepass"))
            self._digest = digest.hexdigest()[:16]
        return {"data": self._digest, "seed": self._seed, "shuffle": self._config.shuffle}

    def _epoch_order(self, epoch: int) -> Sequence[int]:
        if not self._config.shuffle:
            return range(len(self._rows))
        if self._order[0] != epoch:
            order = array("q", range(len(self._rows)))
            random.Random(f"prompts/{self._seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]

    def _render(self, row: int) -> Prompt:
        text = self._config.template.replace("{prompt}", self._rows[row].prompt)
        if self._config.chat:
            messages = [*self._shots, {"role": "user", "content": text}]
            text = str(
                self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            )
        # A chat template writes its special tokens itself; plain text gets what the tokenizer adds by
        # default.
        tokens = self._tokenizer(text, add_special_tokens=not self._config.chat, verbose=False)["input_ids"]
        if not tokens:
            raise UserError(
                f"data.path row {row}: the tokenizer makes no tokens of {text!r}; delete the row or change "
                f"data.template"
            )
        return Prompt(
            position=self.position, row=row, text=text, answer=self._rows[row].answer, tokens=tuple(tokens)
        )


def _few_shot_messages(config: DataConfig) -> list[dict[str, str]]:
    messages = []
    for number, shot in enumerate(config.few_shot):
        if set(shot) != {"prompt", "response"}:
            raise UserError(
                f"data.few_shot[{number}] has the keys {sorted(shot)}; it needs exactly 'prompt' and "
                f"'response'"
            )
        messages.append({"role": "user", "content": config.template.replace("{prompt}", shot["prompt"])})
        messages.append({"role": "assistant", "content": shot["response"]})
    return messages


def _warn_duplicates(rows: Sequence[Row]) -> None:
    answers: dict[str, str] = {}
    conflicts = {row.prompt for row in rows if answers.setdefault(row.prompt, row.answer) != row.answer}
    distinct = len(answers)
    if distinct == len(rows):
        return
    log.warning(
        f"data.path: {len(rows)} rows hold only {distinct} distinct prompts, so one epoch is "
        f"{len(rows) / distinct:.3g} passes "
        "over them (DAPO-Math-17k repeats every prompt 100 times). All rows stay; tools/download_data.py "
        "--dedup drops repeats."
        + (f" {len(conflicts)} prompts have more than one answer." if conflicts else "")
    )
