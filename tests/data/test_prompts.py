"""The prompt stream: reading errors that teach, templates, order, and a cursor that continues exactly."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_dapo.config import DataConfig
from megatron_dapo.data import prompts as prompts_module
from megatron_dapo.data.prompts import PromptStream, Row, load_rows
from megatron_dapo.errors import UserError

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """One token a character; adds a `^` in front by default, as tokenizers with a BOS do."""
    vocab = {chr(code): code - 32 for code in range(32, 127)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="^ $A", special_tokens=[("^", vocab["^"])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", chat_template=chat_template)


TOKENIZER = make_tokenizer()
ROWS = [Row(f"q{i}", str(i)) for i in range(5)]


def make_stream(rows=ROWS, seed=1, **options) -> PromptStream:
    return PromptStream(rows, TOKENIZER, DataConfig(**options), seed)


def take(stream: PromptStream, count: int) -> list:
    return [stream.next() for _ in range(count)]


# --- reading ----------------------------------------------------------------------------


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
    text = [{**row, "solution": str(row["solution"]), "other": 1} for row in GOOD]
    jsonl = write_lines(tmp_path / "rows.jsonl", *map(json.dumps, GOOD[:2]), "", json.dumps(GOOD[2]))
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(text), parquet)
    dataset = datasets.Dataset.from_list(text).with_format("numpy")
    for source in (jsonl, parquet, GOOD, dataset):
        assert load_rows(source, "problem", "solution") == GOOD_ROWS


def test_long_sources_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_module, "READ_ROWS", 2)
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
    check("keys.parquet", r"keys\.parquet: no key 'prompt' .*did you mean data.prompt_key=promt")
    with pytest.raises(UserError, match="the given list has no rows"):
        load_rows([], "prompt", "answer")
    with pytest.raises(UserError, match="the given Dataset: no key 'prompt'"):
        load_rows(datasets.Dataset.from_dict({"a": ["b"]}), "prompt", "answer")


def test_repeated_prompts_are_kept_and_announced_once(caplog):
    rows = [Row("a", "1"), Row("b", "1"), Row("a", "1"), Row("a", "2")]
    stream = make_stream(rows, epochs=1)
    assert len(take(stream, 4)) == 4 and stream.next() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "4 rows hold only 2 distinct prompts" in record.message and "2 passes" in record.message
    assert "1 prompts have more than one answer" in record.message


# --- order ------------------------------------------------------------------------------


def test_epochs_are_different_permutations_and_positions_run_on():
    prompts = take(make_stream(), 15)
    epochs = [[p.row for p in prompts[start : start + 5]] for start in (0, 5, 10)]
    assert all(sorted(rows) == [0, 1, 2, 3, 4] for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3
    assert [p.position for p in prompts] == list(range(15))
    assert all(p.answer == str(p.row) and p.text == f"q{p.row}" for p in prompts)


def test_the_order_depends_on_the_seed_alone():
    rows = [Row(f"q{i}", "1") for i in range(50)]
    assert take(make_stream(rows), 70) == take(make_stream(rows), 70)
    assert take(make_stream(rows), 50) != take(make_stream(rows, seed=2), 50)
    assert [p.row for p in take(make_stream(shuffle=False), 7)] == [0, 1, 2, 3, 4, 0, 1]


def test_the_stream_ends_after_its_epochs():
    stream = make_stream(epochs=2)
    assert None not in take(stream, 10)
    assert stream.next() is None and stream.next() is None and stream.position == 10


# --- cursor -----------------------------------------------------------------------------

LONG = 20
MIXED = [Row("x" * LONG if i % 3 == 1 else f"q{i}", str(i)) for i in range(7)]  # rows 1 and 4 are too long


@pytest.mark.parametrize("stop", range(13))
def test_a_resumed_stream_continues_as_if_not_stopped(stop):
    whole = make_stream(MIXED, max_prompt_tokens=LONG)
    expected = take(whole, 20)
    first = make_stream(MIXED, max_prompt_tokens=LONG)
    take(first, stop)
    second = make_stream(MIXED, max_prompt_tokens=LONG)
    second.load_state(json.loads(json.dumps(first.state())))
    assert (second.position, second.skipped_long, second.epoch) == (
        first.position,
        first.skipped_long,
        first.epoch,
    )
    assert take(second, 20 - stop) == expected[stop:]
    assert second.skipped_long == whole.skipped_long


@pytest.mark.parametrize("position", range(13))
def test_rewinding_restores_the_state_of_that_position(position):
    reference = make_stream(MIXED, max_prompt_tokens=LONG)
    take(reference, position)
    stream = make_stream(MIXED, max_prompt_tokens=LONG)
    prompts = take(stream, 13)
    stream.rewind(position)
    assert stream.state() == reference.state()
    assert take(stream, 13 - position) == prompts[position:]


def test_rewinding_forward_is_refused():
    stream = make_stream()
    take(stream, 3)
    stream.rewind(3)
    for position in (4, -1):
        with pytest.raises(ValueError, match=f"position {position}: .* below 3"):
            stream.rewind(position)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_stream([*ROWS[:4], Row("q4", "5")]), "data.path holds other problems"),
        (make_stream(ROWS[:4]), "data.path holds other problems"),
        (make_stream(seed=2), "run.seed differs"),
        (make_stream(shuffle=False), "data.shuffle differs"),
    ],
)
def test_resuming_with_another_order_is_refused(other, message):
    with pytest.raises(UserError, match=message + ".*run.dir"):
        other.load_state(make_stream().state())


# --- length -----------------------------------------------------------------------------


def test_long_prompts_are_skipped_and_counted(caplog):
    stream = make_stream(MIXED, epochs=2, max_prompt_tokens=LONG)
    prompts = take(stream, 10)
    assert stream.next() is None
    assert sorted(p.row for p in prompts[:5]) == [0, 2, 3, 5, 6]
    assert [p.position for p in prompts] == list(range(10))
    assert stream.skipped_long == 4
    # 20 characters and the special token
    assert any("21 tokens exceed data.max_prompt_tokens=20" in record.message for record in caplog.records)
    fitting = make_stream(MIXED, epochs=1, max_prompt_tokens=LONG + 1)
    assert None not in take(fitting, 7) and fitting.skipped_long == 0


@pytest.mark.parametrize("epochs", [None, 1, 2])
def test_a_stream_without_a_usable_prompt_raises(epochs):
    with pytest.raises(UserError, match="all 5 prompts are longer than data.max_prompt_tokens=2"):
        make_stream(epochs=epochs, max_prompt_tokens=2).next()


# --- templates --------------------------------------------------------------------------


def encode(text: str) -> tuple[int, ...]:
    return tuple(ord(c) - 32 for c in text)


def test_plain_prompts_get_the_tokenizers_special_tokens():
    (prompt,) = take(make_stream([Row("1+{prompt}={x}", "2")], template="Q: {prompt} {answer}\n"), 1)
    assert prompt.text == "Q: 1+{prompt}={x} {answer}\n"
    assert prompt.tokens[:5] == encode("^Q: 1")


def test_chat_prompts_hold_the_special_tokens_of_the_template_only():
    shots = [{"prompt": "2+2", "response": "4"}, {"prompt": "3+3", "response": "6"}]
    (prompt,) = take(make_stream([Row("1+1", "2")], chat=True, template="Solve {prompt}.", few_shot=shots), 1)
    assert (
        prompt.text
        == "<user>Solve 2+2.|<assistant>4|<user>Solve 3+3.|<assistant>6|<user>Solve 1+1.|<assistant>"
    )
    assert prompt.tokens == encode(prompt.text)


def test_chat_needs_a_chat_template_and_complete_examples():
    with pytest.raises(UserError, match="data.chat=true .* no chat template"):
        PromptStream(ROWS, make_tokenizer(None), DataConfig(chat=True), 0)
    with pytest.raises(UserError, match=r"data.few_shot\[0\] has the keys \['answer', 'prompt'\]"):
        make_stream(chat=True, few_shot=[{"prompt": "a", "answer": "b"}])
