"""Pairs of a file: what is read and what is refused, the tokens of a response, order and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.models import make_tokenizer

from megatron_dapo.config import DataConfig, RunConfig
from megatron_dapo.data.preferences import Pair, PairStream, load_pairs
from megatron_dapo.data.template import Template
from megatron_dapo.errors import UserError

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
PAIRS = [Pair(f"{i}+{i}=", str(2 * i), "x" * (i + 1)) for i in range(5)]
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer(template: str = CHAT) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def make_stream(pairs=PAIRS, **values) -> PairStream:
    sections: dict[str, Any] = {"model": {"path": "m"}, "sampling": {"prompts_per_step": 2}}
    for key, value in values.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return PairStream(pairs, TOKENIZER, RunConfig.make(sections))


def said(tokens: Any) -> str:
    return TOKENIZER.decode([int(token) for token in tokens])


# --- rows


def write(path: Path, *rows: Any) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path), prompt_key="question")


GOOD = {"question": "a", "chosen": "b", "rejected": "c", "other": 1}


def test_rows_are_read(tmp_path):
    data = write(tmp_path / "pairs.jsonl", GOOD, GOOD | {"rejected": "d"})
    assert load_pairs(data) == [Pair("a", "b", "c"), Pair("a", "b", "d")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "line 2: a row is an object with a prompt, chosen and rejected, got list"),
        ({"question": "a", "chosen": "b"}, r"line 2: no key 'rejected' \(the worse one\) among"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"line 2: no key 'question' \(data.prompt_key\)"),
        (GOOD | {"chosen": [{"role": "assistant", "content": "b"}]}, "line 2: 'chosen' must be text, got"),
        (GOOD | {"rejected": " "}, "line 2: 'rejected' must be text, got ' '"),
        (GOOD | {"rejected": "b"}, "line 2: 'chosen' and 'rejected' are equal, which is no preference"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_pairs(write(tmp_path / "pairs.jsonl", GOOD, row))


def test_a_file_is_needed(tmp_path):
    with pytest.raises(UserError, match="data.path is required"):
        load_pairs(DataConfig())
    with pytest.raises(UserError, match="has no rows"):
        load_pairs(write(tmp_path / "pairs.jsonl"))


# --- tokens


def test_a_plain_response_ends_with_the_end_of_sequence():
    template = Template(DataConfig(template="Q: {prompt}\nA: "), TOKENIZER)
    text, tokens = template.prompt("1+1=")
    assert text == said(tokens) == "Q: 1+1=\nA: "
    response = template.response("1+1=", " 2\n")
    assert said(response[:-1]) == " 2\n" and response[-1] == EOS and EOS not in response[:-1]


def test_a_chat_response_is_what_the_template_writes_behind_the_prompt():
    shots = [{"prompt": "0+0=", "response": "0"}]
    template = Template(DataConfig(chat=True, few_shot=shots), chat_tokenizer())
    text, _ = template.prompt("1+1=")
    assert text.endswith("0<|eos|>\n[user]1+1=<|eos|>\n[assistant]")
    response = template.response("1+1=", "2\n")
    assert said(response) == "2\n<|eos|>" and response.count(EOS) == 1


def test_a_chat_template_that_ends_nothing_is_ended():
    template = Template(DataConfig(chat=True), chat_tokenizer(CHAT.replace("<|eos|>", "")))
    assert said(template.response("1+1=", "2")) == "2<|eos|>"


def test_a_chat_template_that_rewrites_the_prompt_is_refused():
    rewriting = "{{ messages | length }}" + CHAT
    with pytest.raises(UserError, match="writes a prompt differently when an answer follows it"):
        Template(DataConfig(chat=True), chat_tokenizer(rewriting)).response("1+1=", "2")


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        Template(DataConfig(), tokenizer).response("1+1=", "2")


# --- groups


def test_the_better_response_is_first_and_none_is_of_the_runs_weights():
    [group] = make_stream(PAIRS[3:4], data__epochs=1).next()
    assert [said(c.tokens) for c in group.completions] == ["6<|eos|>", "xxxx<|eos|>"]
    assert group.prompt.text == said(group.prompt.tokens) == "3+3=" and group.rewards == (1.0, -1.0)
    assert group.correct == (True, False) and [c.number for c in group.completions] == [0, 1]
    assert all(c.trained.all() and c.weight_version == -1 for c in group.completions)


def rows(stream: PairStream, steps: int) -> list[list[int]]:
    return [[group.prompt.row for group in stream.next()] for _ in range(steps)]


def test_each_epoch_has_every_pair_once_in_an_order_of_its_own():
    steps = rows(make_stream(data__epochs=2), 6)
    assert [len(step) for step in steps] == [2, 2, 2, 2, 2, 0]
    flat = [row for step in steps for row in step]
    assert sorted(flat[:5]) == sorted(flat[5:]) == list(range(5)) and flat[:5] != flat[5:]
    assert flat == [row for step in rows(make_stream(data__epochs=2), 6) for row in step]
    assert rows(make_stream(data__shuffle=False), 2) == [[0, 1], [2, 3]]
    assert make_stream(run__seed=1).next() != make_stream().next()


def test_a_resumed_stream_goes_on():
    stream, other = make_stream(), make_stream()
    stream.next()
    other.load_state(stream.state())
    assert [other.next() for _ in range(4)] == [stream.next() for _ in range(4)]


def test_long_pairs_are_passed_over_and_counted(caplog):
    """Responses have their letters and the end: the last two of five are above 4 tokens."""
    stream = make_stream(rollout__max_tokens=4, data__shuffle=False, data__epochs=1)
    assert rows(stream, 3) == [[0, 1], [2], []] and stream.num_long == 2
    assert len(caplog.records) == 1 and "data.path row 3: 4 tokens of the prompt and 5" in caplog.text
    stream = make_stream([*PAIRS, Pair("1234567=", "a", "b")], data__max_prompt_tokens=7, data__epochs=1)
    assert [len(step) for step in rows(stream, 4)] == [2, 2, 1, 0]
    with pytest.raises(UserError, match="all 5 pairs are longer than data.max_prompt_tokens=3 and"):
        make_stream(data__max_prompt_tokens=3).next()
