"""Pairs of responses of a file, as groups that objective.kind=dpo trains on without an engine
(tools/train_dpo.py).

stream = PairStream(load_pairs(config.data), tokenizer, config)
groups = stream.next()               # empty at the end of the last epoch
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_dapo.config import DataConfig, RunConfig
from megatron_dapo.data.prompts import Source
from megatron_dapo.data.rows import check_keys, read_items
from megatron_dapo.data.template import Template
from megatron_dapo.errors import UserError
from megatron_dapo.types import Completion, Group, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
CHOSEN, REJECTED = "chosen", "rejected"  # keys of a row


@dataclass(frozen=True, slots=True)
class Pair:
    """A row: a problem, the better response to it and the worse one."""

    prompt: str
    chosen: str
    rejected: str


def load_pairs(data: DataConfig) -> list[Pair]:
    """Every row of data.path: JSON Lines or Parquet with data.prompt_key, `chosen` and `rejected`, all texts.
    UserError names the file, the line and the remedy.
    """
    if data.path is None:
        raise UserError(
            "data.path is required: a .jsonl or .parquet file of rows with a prompt, chosen and rejected"
        )
    pairs = [_make_pair(item, where, data.prompt_key) for where, item in read_items(data.path, "data.path")]
    if not pairs:
        raise UserError(f"data.path: {data.path} has no rows; give it at least one pair")
    return pairs


def _make_pair(item: Any, where: str, prompt_key: str) -> Pair:
    keys = {"data.prompt_key": prompt_key, "the better response": CHOSEN, "the worse one": REJECTED}
    check_keys(item, where, keys, f"a prompt, {CHOSEN} and {REJECTED}")
    values = [item[key] for key in keys.values()]
    for key, value in zip(keys.values(), values, strict=True):
        if not isinstance(value, str) or not value.strip():
            raise UserError(
                f"{where}: {key!r} must be text, got {value!r:.60}; take the text out of chat messages, or "
                "delete the row"
            )
    pair = Pair(*values)
    if pair.chosen == pair.rejected:
        raise UserError(f"{where}: {CHOSEN!r} and {REJECTED!r} are equal, which is no preference; delete it")
    return pair


class PairStream:
    """Groups of two responses, the better one first, `sampling.prompts_per_step` of them at a time: shuffled
    anew each epoch, endless or until `data.epochs`.

    num_long: pairs that were passed over because their prompt or a response is longer than
    data.max_prompt_tokens or rollout.max_tokens.
    """

    def __init__(self, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> None:
        self._pairs, self._config, self.num_long = pairs, config, 0
        self._template, data = Template(config.data, tokenizer), config.data
        key = f"pairs/{config.run.seed}"
        self._source = Source(None, pairs, 0, 1.0, key, data.shuffle, data.epochs)

    @property
    def epochs(self) -> float:
        """Passes over the file so far."""
        return self._source.turn / len(self._pairs)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"turn": self._source.turn, "num_long": self.num_long}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from `state()`."""
        self._source.turn, self.num_long = state["turn"], state["num_long"]

    def next(self) -> list[Group]:
        """The next step's groups; fewer, or none, at the end. UserError when a whole pass finds every pair
        too long.
        """
        groups, passed = list[Group](), 0
        while len(groups) < self._config.sampling.prompts_per_step and not self._source.has_ended:
            position, row = self._source.turn, self._source.take_turn()
            if group := self._make_group(position, row):
                groups.append(group)
                passed = 0
            elif (passed := passed + 1) == len(self._pairs):
                raise UserError(
                    f"data.path: all {passed} pairs are longer than "
                    f"data.max_prompt_tokens={self._config.data.max_prompt_tokens} and "
                    f"rollout.max_tokens={self._config.rollout.max_tokens} allow; raise them, and "
                    "batch.max_tokens with them"
                )
        return groups

    def _make_group(self, position: int, row: int) -> Group | None:
        """None if it is too long."""
        pair = self._pairs[row]
        text, tokens = self._template.prompt(pair.prompt)
        responses = [self._template.response(pair.prompt, said) for said in (pair.chosen, pair.rejected)]
        longest, config = max(map(len, responses)), self._config
        if len(tokens) > config.data.max_prompt_tokens or longest > config.rollout.max_tokens:
            self.num_long += 1
            if self.num_long == 1:
                log.warning(
                    f"data.path row {row}: {len(tokens)} tokens of the prompt and {longest} of a response "
                    f"exceed data.max_prompt_tokens={config.data.max_prompt_tokens} or "
                    f"rollout.max_tokens={config.rollout.max_tokens}; passed over, and so are others"
                )
            return None
        if not tokens:
            raise UserError(f"data.path row {row}: the tokenizer makes no tokens of {text!r}; delete the row")
        return Group(
            prompt=Prompt(position=position, row=row, text=text, answer="", tokens=tokens),
            completions=tuple(_completion(tokens, number) for number, tokens in enumerate(responses)),
            correct=(True, False),
            rewards=(1.0, -1.0),
        )


def _completion(tokens: Sequence[int], number: int) -> Completion:
    """No engine sampled it, so it has no log-probabilities, and is of no weights of the run."""
    return Completion(
        tokens=np.array(tokens, dtype=np.int32),
        logprobs=np.zeros(len(tokens), dtype=np.float32),
        trained=np.broadcast_to(np.True_, len(tokens)),
        finish_reason="stop",
        versions=((-1, len(tokens)),),
        number=number,
    )
