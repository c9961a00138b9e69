"""From completions to a group: grades of the decoded tokens, shaped rewards, masks, and what is measured."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from support.bytes_as_tokens import as_tokens, make_byte_backend
from support.samples import make_completion, make_prompt
from transformers import PreTrainedTokenizerFast

from megatron_dapo.config import DataConfig, RewardConfig
from megatron_dapo.data.prompts import PromptStream
from megatron_dapo.data.rows import load_rows
from megatron_dapo.errors import UserError
from megatron_dapo.reward.grading import Grader
from megatron_dapo.reward.jobs import Grade
from megatron_dapo.types import Completion, Timing

RIGHT = Grade("correct", 1.0)
WRONG = Grade("wrong", -1.0)
ERROR = Grade("crashed")
TIMEOUT = Grade("timeout")
LONGEST = 10
NONE = dict.fromkeys(("correct", "wrong", "no_answer", "timeout", "crashed"), 0)


@pytest.fixture(autouse=True)
def verifiers_on_path(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "support")


@pytest.fixture
def make_grader():
    made = []
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_byte_backend(), eos_token="<|end|>")

    def make(**reward) -> Grader:
        made.append(Grader(RewardConfig(**reward), tokenizer, longest=LONGEST))
        return made[-1]

    yield make
    for grader in made:
        grader.close()


def says(text: str, **changed) -> Completion:
    return make_completion(as_tokens(text).tolist(), **changed)


async def test_each_completion_is_graded_by_its_text(make_grader):
    grader, prompt = make_grader(), make_prompt(answer="7")
    completions = [says("Answer: 7"), says("Answer: 8"), says("\\boxed{7}")]
    grades = await asyncio.gather(*(grader.grade(prompt, completion) for completion in completions))
    assert grades == [RIGHT, WRONG, RIGHT]


async def test_a_grade_does_not_wait_for_those_asked_for_before(make_grader):
    grader, prompt = make_grader(verifier="pool_verifiers:check", workers=2), make_prompt(answer="7")
    hanging = asyncio.create_task(grader.grade(prompt, says("hang")))
    assert await grader.grade(prompt, says("7")) == RIGHT
    assert not hanging.done()
    hanging.cancel()


def test_a_group_has_its_prompts_completions_grades_and_rewards(make_grader):
    grader, prompt = make_grader(), make_prompt(3, answer="7")
    completions = [make_completion((7, 0)), make_completion((8,), number=1), make_completion((9,), number=2)]
    timing = Timing(engine="engine_0", sent=1.0, answered=2.0, graded=3.0)
    group = grader.group(prompt, completions, [RIGHT, WRONG, WRONG], timing)
    assert group.prompt is prompt and list(group.completions) == completions and group.timing == timing
    assert group.correct == (True, False, False) and group.rewards == (1.0, -1.0, -1.0)
    assert grader.group(prompt, completions, [RIGHT] * 3).timing is None


@pytest.mark.parametrize("no_grade", [ERROR, TIMEOUT])
def test_a_response_without_a_grade_is_masked_and_neither_right_nor_wrong(make_grader, no_grade):
    completions = [make_completion((7,) * n, number=n) for n in (8, 9, 2)]
    group = make_grader(overlong_cache=4).group(make_prompt(), completions, [RIGHT, no_grade, RIGHT])
    assert group.correct == (True, None, True) and group.accuracy == 1.0
    assert group.rewards == (0.5, -0.75, 1.0), "the overlong penalty alone"
    assert [completion.trained.all() for completion in group.completions] == [True, False, True]


def test_long_responses_are_penalised_whatever_their_grade(make_grader):
    """L_max 10, L_cache 4: 0 up to 6 tokens, -1/4 for each one more. The grade is the verifier's alone."""
    completions = [make_completion((7,) * n) for n in (6, 7, 8, 10, 9)]
    group = make_grader(overlong_cache=4).group(make_prompt(), completions, [RIGHT] * 4 + [WRONG])
    assert group.correct == (True, True, True, True, False)
    assert group.rewards == (1.0, 0.75, 0.5, 0.0, -1.75)
    assert all(completion.trained.all() for completion in group.completions)


async def test_a_prompts_rule_goes_before_the_verifier(make_grader):
    grader, said = make_grader(verifier="dapo"), says("\\boxed{7}")
    assert (await grader.grade(make_prompt(answer="7"), said)).outcome == "no_answer"
    named = dataclasses.replace(make_prompt(answer="7"), rule="exact")
    assert await grader.grade(named, said) == RIGHT
    with pytest.raises(UserError, match="reward.verifier='dappo'"):
        await grader.grade(dataclasses.replace(named, rule="dappo"), said)


async def test_rules_see_the_prompt(make_grader, tmp_path, monkeypatch):
    (tmp_path / "prompt_rule.py").write_text("def rule(response, answer, row): return row['prompt'] == 'Q?'")
    monkeypatch.syspath_prepend(tmp_path)
    grader = make_grader(verifier="prompt_rule:rule")
    for text, decision in (("Q?", "correct"), ("Q!", "wrong")):
        prompt = dataclasses.replace(make_prompt(answer="7"), text=text)
        assert (await grader.grade(prompt, says("7"))).outcome == decision


async def test_rules_see_the_whole_row_as_in_the_tool_that_grades_files(make_grader, tmp_path, monkeypatch):
    """From the file to the rule: fields of the row's own, also one named as what a prompt has anyway."""
    wanted = "row['level'] == 3 and row['source'] == 's' and row['answer'] == '7'"
    (tmp_path / "row_rule.py").write_text(f"def rule(response, answer, row): return {wanted}")
    monkeypatch.syspath_prepend(tmp_path)
    rows = load_rows([{"q": "Q?", "a": 7, "level": n, "source": "s"} for n in (3, 4)], "q", "a")
    config = DataConfig(shuffle=False, epochs=1)
    stream = PromptStream({None: rows}, lambda text, **_: {"input_ids": [1]}, config, 0)  # type: ignore[arg-type]
    grader = make_grader(verifier="row_rule:rule")
    prompts = [stream.next(), stream.next()]
    grades = [await grader.grade(pickle.loads(pickle.dumps(prompt)), says("7")) for prompt in prompts]
    assert [grade.outcome for grade in grades] == ["correct", "wrong"]


def test_several_rewards_are_weighted_and_kept_apart(make_grader):
    grader = make_grader(rules={"exact": 0.25, "choice": -2.0}, overlong_cache=4)
    grades = [Grade("wrong", -0.5, extra=(1.0, 0.5)), Grade("crashed")]
    group = grader.group(make_prompt(), [make_completion((7,) * n) for n in (8, 9)], grades)
    assert group.rewards == (-0.5 + 0.25 - 1.0 - 0.5, -0.75) and group.correct == (False, None)
    parts = [completion.reward_parts for completion in group.completions]
    assert parts[0] == {"verifier": -0.5, "exact": 0.25, "choice": -1.0, "overlong": -0.5}
    assert parts[1] == {"verifier": 0.0, "exact": 0.0, "choice": 0.0, "overlong": -0.75}


def test_one_reward_has_no_parts(make_grader):
    (completion,) = make_grader().group(make_prompt(), [make_completion((7,))], [RIGHT]).completions
    assert completion.reward_parts == {}


@pytest.mark.parametrize("overlong_filter", [False, True])
def test_the_overlong_filter_masks_truncated_responses_and_only_those(make_grader, overlong_filter):
    completions = [make_completion((7, 7), finish_reason="length"), make_completion((7, 7))]
    group = make_grader(overlong_filter=overlong_filter).group(make_prompt(), completions, [RIGHT] * 2)
    truncated, ended = group.completions
    assert truncated.trained.tolist() == [not overlong_filter] * 2
    assert ended.trained.tolist() == [True, True]
    assert group.rewards == (1.0, 1.0) and completions[0].trained.all()


def test_a_masked_response_holds_no_mask_of_its_own(make_grader):
    completion = make_completion((7,) * 10, finish_reason="length")
    (masked,) = make_grader(overlong_filter=True).group(make_prompt(), [completion], [RIGHT]).completions
    assert masked.trained.strides == (0,)
    assert masked == make_completion((7,) * 10, finish_reason="length", trained=[False] * 10)


async def test_what_became_of_the_grades_is_counted_until_it_is_reset(make_grader):
    grader = make_grader(verifier="pool_verifiers:check", timeout_s=0.5)
    prompt = make_prompt(answer="7")
    texts = ["7", "8", "hang", "raise", "crash"]
    await asyncio.gather(*(grader.grade(prompt, says(text)) for text in texts))
    assert grader.counts == NONE | {"correct": 1, "wrong": 1, "timeout": 1, "crashed": 2}
    grader.reset()
    assert grader.counts == NONE
    assert await grader.grade(prompt, says("7")) == RIGHT
    assert grader.counts == NONE | {"correct": 1}


async def test_a_grade_that_is_no_longer_waited_for_is_not_counted(make_grader):
    grader = make_grader(verifier="pool_verifiers:check", timeout_s=0.5)
    tasks = [asyncio.create_task(grader.grade(make_prompt(answer="7"), says(text))) for text in ("hang", "7")]
    await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    assert await grader.grade(make_prompt(answer="7"), says("8")) == WRONG
    assert grader.counts == NONE | {"wrong": 1}


async def test_seconds_are_of_the_clock_not_of_the_completions(make_grader, monkeypatch):
    """Two completions wait from 10 to 13 and from 11 to 15; then one from 20 to 22, reset at 21."""
    grader, prompt = make_grader(), make_prompt(answer="7")
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    asked: list[asyncio.Future] = []

    def grade_tokens(tokens: np.ndarray, answer: str, *, rule: None, row: object) -> asyncio.Future:
        asked.append(asyncio.get_running_loop().create_future())
        return asked[-1]

    monkeypatch.setattr(grader._pool, "grade_tokens", grade_tokens)
    grader.reset()
    tasks = []
    for begin, number, what in [
        (10.0, 0, "ask"), (11.0, 1, "ask"), (13.0, 0, "grade"), (15.0, 1, "grade"), (20.0, 2, "ask"),
    ]:  # fmt: skip
        now = begin
        if what == "ask":
            tasks.append(asyncio.create_task(grader.grade(prompt, says("Answer: 7"))))
        else:
            asked[number].set_result(RIGHT)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert grader.seconds == 5.0
    now = 21.0
    assert grader.seconds == 6.0
    grader.reset()
    assert grader.seconds == 0.0
    now = 22.0
    asked[2].set_result(RIGHT)
    assert await asyncio.gather(*tasks) == [RIGHT] * 3
    now = 30.0
    assert grader.seconds == 1.0


def test_a_verifier_that_does_not_exist_is_the_users_to_mend(make_grader):
    with pytest.raises(UserError, match="must be 'dapo'"):
        make_grader(verifier="nonsense")
