"""The tiny base model's problems: answers by independent arithmetic, flaws that really are wrong, splits
without overlap.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import make_arithmetic
import make_tiny_base as tiny
from made_folder import STAMP, make_folder
from transformers import AutoTokenizer, Qwen2Config

PROBLEMS = tiny.all_problems()


def evaluate(expression: str) -> int:
    """Sums and differences of whole numbers, left to right."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expression))


def final(text: str) -> int:
    return int(text.rsplit("Answer: ", 1)[1])


def test_every_problem_is_there_once():
    assert len(PROBLEMS) == len(set(PROBLEMS)) == 90 * 90 + 90 * 91 // 2


def test_every_solution_is_right_at_every_step():
    for problem in PROBLEMS:
        text = tiny.solve(problem)
        expected = evaluate(re.fullmatch(r"What is (.*)\?\n", tiny.question(problem))[1])
        assert final(text) == tiny.answer(problem) == expected
        assert all(evaluate(left) == int(right) for left, right in re.findall(r"([\d+-]+)=(-?\d+)", text)), (
            text
        )


@pytest.mark.parametrize("flaw", tiny.FLAWS)
def test_every_flaw_ends_in_a_wrong_answer(flaw):
    rng = random.Random(3)
    for problem in PROBLEMS:
        text = tiny.solve(problem, flaw, rng)
        assert re.fullmatch(r"[\d+-]+=\d+,[\d+-]+=-?\d+\nAnswer: -?\d+", text)
        assert final(text) != tiny.answer(problem), (problem, text)


@pytest.mark.parametrize(
    "problem,text",
    [
        ((37, "+", 48), "7+8=15,3+4+1=8\nAnswer: 85"),
        ((95, "+", 94), "5+4=9,9+9=18\nAnswer: 189"),
        ((85, "-", 37), "15-7=8,8-3-1=4\nAnswer: 48"),
        ((85, "-", 83), "5-3=2,8-8=0\nAnswer: 2"),
    ],
)
def test_solution_by_hand(problem, text):
    assert tiny.solve(problem) == text


def test_splits_share_no_problem_and_depend_on_the_seed_alone():
    warm_up, train, held_out = tiny.split_problems(5)
    assert (len(train), len(held_out)) == (tiny.NUM_TRAIN, tiny.NUM_EVAL)
    assert len({*warm_up, *train, *held_out}) == len(warm_up) + len(train) + len(held_out) == len(PROBLEMS)
    assert tiny.split_problems(5) == (warm_up, train, held_out)
    assert tiny.split_problems(6) != (warm_up, train, held_out)


def test_tokenizer_gives_back_the_text_splits_evenly_and_survives_loading(tmp_path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    text = tiny.question((37, "+", 48)) + tiny.solve((37, "+", 48)) + tiny.EOS
    ascii_text = "".join(map(chr, range(32, 127)))
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        tokens = loaded(text)["input_ids"]
        assert (
            tokens == tokenizer(text)["input_ids"]
            and tokens[-1] == loaded.eos_token_id == tokenizer.eos_token_id
        )
        assert loaded.decode(tokens) == text and loaded.decode(loaded(ascii_text)["input_ids"]) == ascii_text
        assert loaded.tokenize("What is 12?\nAnswer: 3") == [
            "What",
            "Ġis",
            "Ġ",
            "1",
            "2",
            "?",
            "Ċ",
            "Answer",
            ":",
            "Ġ",
            "3",
        ]
        assert len(loaded) % 8 == 0 and loaded.pad_token_id == tokenizer.pad_token_id


def test_batch_labels_cover_the_response_and_its_end():
    tokenizer = tiny.make_tokenizer()
    tokens, labels = tiny.make_batch(tokenizer, [(37, "+", 48), (10, "-", 10)], 0.0, random.Random(0))
    for row, label, text in zip(
        tokens, labels, ["7+8=15,3+4+1=8\nAnswer: 85", "0-0=0,1-1=0\nAnswer: 0"], strict=True
    ):
        assert tokenizer.decode(label[label != -100]) == text + tiny.EOS
        assert (row[label != -100] == label[label != -100]).all()


def test_arithmetic_rows_are_right_distinct_and_disjoint():
    train, held_out = map(make_arithmetic.rows, make_arithmetic.split_problems(0))
    assert (len(train), len(held_out)) == (make_arithmetic.NUM_TRAIN, make_arithmetic.NUM_EVAL)
    assert len({row["prompt"] for row in train + held_out}) == len(train) + len(held_out)
    for row in train + held_out:
        assert int(row["answer"]) == evaluate(
            row["prompt"].removeprefix("What is ").removesuffix("?").replace(" ", "")
        )
    assert make_arithmetic.split_problems(0)[0] != make_arithmetic.split_problems(1)[0]


def test_folder_is_made_once_per_arguments_and_never_replaces_a_stranger(tmp_path):
    folder, builds = tmp_path / "made", []

    def build(path: Path) -> None:
        builds.append(path)
        (path / "content").write_text(str(len(builds)))

    assert make_folder(folder, {"seed": 0}, build)
    assert not make_folder(folder, {"seed": 0}, build)
    assert make_folder(folder, {"seed": 1}, build)
    assert (folder / "content").read_text() == "2" and json.loads((folder / STAMP).read_text()) == {"seed": 1}

    def fail(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_folder(folder, {"seed": 2}, fail)
    assert (folder / "content").read_text() == "2" and list(tmp_path.iterdir()) == [folder]
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="did not make"):
        make_folder(stranger, {"seed": 0}, build)
