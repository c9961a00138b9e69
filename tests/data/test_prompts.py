"""The prompt stream: reading errors that teach, templates, order, and a cursor that continues exactly."""

from __future__ import annotations

import hashlib
import json
import logging
import math

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_dapo.config import DataConfig
from megatron_dapo.data import prompts as prompts_module
from megatron_dapo.data.prompts import PromptStream
from megatron_dapo.data.rows import Row
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
    return PromptStream({None: rows}, TOKENIZER, DataConfig(**options), seed)


def take(stream: PromptStream, count: int) -> list:
    return [stream.next() for _ in range(count)]


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


@pytest.mark.parametrize(
    ("number", "options", "beginning", "digest"),
    [
        (70, {"seed": 1}, [41, 35, 23, 44, 12, 5, 18, 30, 27, 49, 26, 37], "73b83abe74a6c112"),
        (100, {"seed": 3}, [47, 42, 5, 26, 18, 12, 32, 2, 9, 20, 0, 38], "a817d35b3bdc1fc7"),
    ],
)
def test_the_order_of_a_seed_is_that_of_earlier_versions(number, options, beginning, digest):
    """Written down before there were sources and history; the second with every third row too long."""
    long = options["seed"] == 3
    rows = [Row("x" * 20 if long and i % 3 == 1 else f"q{i}", "1") for i in range(50)]
    order = [prompt.row for prompt in take(make_stream(rows, max_prompt_tokens=19, **options), number)]
    assert order[:12] == beginning
    assert hashlib.sha256(repr(order).encode()).hexdigest()[:16] == digest


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
    assert (second.position, second.passed_over) == (first.position, first.passed_over)
    assert take(second, 20 - stop) == expected[stop:]
    assert second.passed_over["long"] == whole.passed_over["long"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_stream([*ROWS[:4], Row("q4", "5")]), r"data.path \(or data.sources\) holds other problems"),
        (make_stream(ROWS[:4]), r"data.path \(or data.sources\) holds other problems"),
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
    assert stream.passed_over["long"] == 4
    # 20 characters and the special token
    assert any("21 tokens exceed data.max_prompt_tokens=20" in record.message for record in caplog.records)
    fitting = make_stream(MIXED, epochs=1, max_prompt_tokens=LONG + 1)
    assert None not in take(fitting, 7) and fitting.passed_over["long"] == 0


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
        PromptStream({None: ROWS}, make_tokenizer(None), DataConfig(chat=True), 0)
    with pytest.raises(UserError, match=r"data.few_shot\[0\] has the keys \['answer', 'prompt'\]"):
        make_stream(chat=True, few_shot=[{"prompt": "a", "answer": "b"}])


# --- sources ------------------------------------------------------------------------------

EASY, HARD = [Row(f"e{i}", "1") for i in range(4)], [Row(f"h{i}", "1", "choice") for i in range(2)]
SOURCES = [{"path": "easy.jsonl"}, {"path": "b.jsonl", "name": "hard", "weight": 3}]


def make_mixture(seed=1, **options) -> PromptStream:
    rows = {"easy": EASY, "hard": HARD}
    return PromptStream(rows, TOKENIZER, DataConfig(sources=SOURCES, **options), seed)


def test_prompts_of_sources_are_numbered_end_to_end_and_carry_their_rule():
    prompts = take(make_mixture(), 60)
    assert [p.position for p in prompts] == list(range(60))
    for prompt in prompts:
        hard = prompt.row >= 4
        assert prompt.source == ("hard" if hard else "easy") and prompt.rule == ("choice" if hard else None)
        assert prompt.text == (HARD[prompt.row - 4] if hard else EASY[prompt.row]).prompt
    assert {p.source for p in take(make_stream(), 5)} == {None}


def test_a_source_that_has_ended_leaves_the_others_their_epochs():
    """Each is gone through twice, whatever the weights."""
    stream = make_mixture(epochs=2)
    rows = [p.row for p in iter(stream.next, None)]
    assert sorted(rows) == sorted(2 * list(range(6))) and stream.position == 12
    assert set(rows[-4:]) <= {0, 1, 2, 3}, "the hard ones, three of four, are over first"


@pytest.mark.parametrize("stop", [0, 1, 7, 20])
def test_a_mixture_is_resumed_exactly(stop):
    expected = take(make_mixture(), 40)
    first, second = make_mixture(), make_mixture()
    assert take(first, stop) == expected[:stop]
    second.load_state(json.loads(json.dumps(first.state())))
    assert take(second, 40 - stop) == expected[stop:]


def test_a_source_of_long_prompts_alone_is_named():
    rows = {"easy": EASY, "hard": [Row("x" * LONG, "1")]}
    stream = PromptStream(rows, TOKENIZER, DataConfig(sources=SOURCES, max_prompt_tokens=9), 1)
    with pytest.raises(UserError, match="data.sources 'hard': all 1 prompts are longer"):
        take(stream, 50)


# --- what was sampled before --------------------------------------------------------------


def sampled(stream: PromptStream, number: int, accuracy) -> list[int]:
    """Rows of the next prompts; each is recorded at once with `accuracy(row)`."""
    rows = []
    for _ in range(number):
        prompt = stream.next()
        assert prompt is not None
        stream.record(prompt, accuracy(prompt.row))
        rows.append(prompt.row)
    return rows


def test_solved_prompts_are_skipped_for_some_epochs():
    """Rows 0 and 1 are always solved: in epochs 1 and 2 they are skipped, in epoch 3 sampled again."""
    stream = make_stream(shuffle=False, skip_solved=2)
    rows = sampled(stream, 5 + 3 + 3 + 5 + 3, lambda row: float(row < 2))
    assert rows == [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 0, 1, 2, 3, 4, 2, 3, 4]
    assert stream.passed_over["solved"] == 6
    assert stream.metrics() == {
        "data/epochs": 5.0,
        "data/seen": 1.0,
        "data/solved": 0.4,
        "data/passed_over_long": 0,
        "data/passed_over_solved": 6,
        "data/passed_over_pool": 0,
    }


def test_when_everything_is_solved_its_rest_passes_at_once():
    stream = make_stream(shuffle=False, skip_solved=3)
    assert sampled(stream, 10, lambda row: 1.0) == [0, 1, 2, 3, 4] * 2
    assert stream.metrics()["data/epochs"] == 5.0, "the second time in epoch 4"


def test_a_prompt_that_is_no_longer_solved_is_sampled_each_epoch():
    accuracies = iter([1.0] * 5 + [0.5] * 5)
    stream = make_stream(shuffle=False, skip_solved=1)
    sampled(stream, 10, lambda row: next(accuracies))
    assert sampled(stream, 10, lambda row: 0.5) == [0, 1, 2, 3, 4] * 2


def test_a_verdict_counts_behind_the_lag():
    """With a lag of 7, position 8 is the first that knows the verdict of position 0."""
    data = DataConfig(shuffle=False, skip_solved=1)
    stream = PromptStream({None: ROWS}, TOKENIZER, data, 1, lag=7)
    assert sampled(stream, 13, lambda row: float(row == 0)) == [0, 1, 2, 3, 4] * 2 + [1, 2, 3]


@pytest.mark.parametrize("stop", range(0, 40, 3))
def test_a_curriculum_is_resumed_exactly(stop):
    """Cursor, history and what waits behind the lag, as JSON."""
    pools = [{"up_to": 0.4, "weight": 0.5}, {"up_to": 1.0, "weight": 0.7}]
    data = DataConfig(skip_solved=2, solved=0.8, pools=pools)

    def make() -> PromptStream:
        return PromptStream({None: ROWS}, TOKENIZER, data, 1, lag=3)

    def accuracy(row: int) -> float:
        return (row + 1) / 5

    whole, first, second = make(), make(), make()
    expected = sampled(whole, 60, accuracy)
    assert sampled(first, stop, accuracy) == expected[:stop]
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    assert sampled(second, 60 - stop, accuracy) == expected[stop:]
    assert second.state() == whole.state() and second.metrics() == whole.metrics()


def test_pools_that_take_nothing_are_an_error(monkeypatch):
    monkeypatch.setattr(prompts_module, "MOST_PASSES", 3)
    stream = make_stream(pools=[{"up_to": 1.0, "weight": 1e-9}])
    sampled(stream, 5, lambda row: 0.5)
    with pytest.raises(UserError, match="no prompt was taken in 3 passes; raise the weights of data.pools"):
        stream.next()


def test_ungraded_groups_say_nothing():
    stream = make_stream(shuffle=False, skip_solved=1)
    assert sampled(stream, 10, lambda row: math.nan) == [0, 1, 2, 3, 4] * 2
    assert stream.metrics()["data/seen"] == 0
