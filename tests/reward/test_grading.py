"""From completions to a group: texts, grades, shaped rewards, masks."""

from __future__ import annotations

import pytest
from support.samples import make_completion, make_prompt

from megatron_dapo.config import RewardConfig
from megatron_dapo.errors import UserError
from megatron_dapo.reward.grading import Grader

LONGEST = 10


class Tokenizer:
    """Token 7 reads "Answer: 7"; token 0 is special."""

    def batch_decode(self, sequences, *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens and all(type(token) is int for tokens in sequences for token in tokens)
        return ["\n".join(f"Answer: {token}" for token in tokens if token) for tokens in sequences]


@pytest.fixture
def make_grader():
    made = []

    def make(**reward) -> Grader:
        made.append(Grader(RewardConfig(**reward), Tokenizer(), longest=LONGEST))
        return made[-1]

    yield make
    for grader in made:
        grader.close()


async def test_a_group_has_texts_grades_and_rewards(make_grader):
    grader = make_grader()
    completions = [make_completion((7, 0)), make_completion((8,), number=1)]
    group = await grader.grade(make_prompt(3, answer="7"), completions)
    assert group.prompt.position == 3
    assert [completion.text for completion in group.completions] == ["Answer: 7", "Answer: 8"]
    assert [completion.number for completion in group.completions] == [0, 1]
    assert group.correct == (True, False) and group.rewards == (1.0, -1.0)
    assert grader.seconds > 0


async def test_long_responses_are_penalised_whatever_their_grade(make_grader):
    """L_max 10, L_cache 4: 0 up to 6 tokens, -1/4 for each one more. The grade is the verifier's alone."""
    grader = make_grader(overlong_cache=4)
    lengths = [6, 7, 8, 10]
    completions = [make_completion((7,) * n) for n in lengths] + [make_completion((8,) * 9)]
    group = await grader.grade(make_prompt(answer="7"), completions)
    assert group.correct == (True, True, True, True, False)
    assert group.rewards == (1.0, 0.75, 0.5, 0.0, -1.75)
    assert all(completion.trained.all() for completion in group.completions)


@pytest.mark.parametrize("overlong_filter", [False, True])
async def test_the_overlong_filter_masks_truncated_responses_and_only_those(make_grader, overlong_filter):
    grader = make_grader(overlong_filter=overlong_filter)
    completions = [make_completion((7, 7), finish_reason="length"), make_completion((7, 7))]
    group = await grader.grade(make_prompt(answer="7"), completions)
    truncated, ended = group.completions
    assert truncated.trained.tolist() == [not overlong_filter] * 2
    assert ended.trained.tolist() == [True, True]
    assert group.rewards == (1.0, 1.0) and completions[0].trained.all()


async def test_a_failing_verifier_is_scored_wrong_and_counted(make_grader):
    grader = make_grader()
    group = await grader.grade(make_prompt(answer=""), [make_completion((7,))])  # the verifier raises
    assert group.correct == (False,) and group.rewards == (-1.0,)
    assert grader.pool.counts["error"] == 1


def test_a_verifier_that_does_not_exist_is_the_users_to_mend(make_grader):
    with pytest.raises(UserError, match="must be 'dapo'"):
        make_grader(verifier="nonsense")
