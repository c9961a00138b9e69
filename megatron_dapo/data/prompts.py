"""The prompt stream: rows of one or several sources in a deterministic order, rendered and tokenised when
they are reached (docs/data.md).

    stream = PromptStream(load_sources(config.data), tokenizer, config.data, seed=config.run.seed)
    prompt = stream.next()               # None after the last epoch

A source's rows are shuffled anew each epoch, and its epochs laid end to end. A *turn* is a place there: its
prompt is taken, or passed over because it is too long, solved, or of a pool that is taken less often.
"""

from __future__ import annotations

import hashlib
import logging
import random
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from megatron_dapo.config import DataConfig
from megatron_dapo.data.history import History, Known
from megatron_dapo.data.rows import Row
from megatron_dapo.data.template import Template
from megatron_dapo.errors import UserError
from megatron_dapo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MOST_PASSES = 1000  # over a source without a prompt that is taken, before that is an error
PassedOver = Literal["long", "solved", "pool"]


@dataclass(slots=True)
class Source:
    """The rows of one source in the order of their turns. first: number of its first row among those of all
    sources. key: what its shuffling is seeded with. turn: the next one.
    """

    name: str | None
    rows: Sequence[Any]
    first: int
    weight: float
    key: str
    shuffle: bool
    epochs: int | None
    turn: int = 0
    _order: tuple[int, Sequence[int]] = field(default=(-1, ()))  # (epoch, its order)

    @property
    def has_ended(self) -> bool:
        return self.epochs is not None and self.turn >= self.epochs * len(self.rows)

    @property
    def where(self) -> str:
        """For messages."""
        return "data.path" if self.name is None else f"data.sources {self.name!r}"

    def take_turn(self) -> int:
        """The number of its row whose turn it is."""
        epoch, place = divmod(self.turn, len(self.rows))
        self.turn += 1
        return self._epoch_order(epoch)[place]

    def _epoch_order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.rows))
        if self._order[0] != epoch:
            order = array("q", range(len(self.rows)))
            random.Random(f"{self.key}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


class PromptStream:
    """Prompts of all sources, endless or until each source has had `config.epochs`, resumable anywhere.

    sources: rows by the source's name, None where there is only data.path. lag: a prompt is chosen knowing
    the verdicts of all positions more than `lag` before it, and no others; the caller must have recorded them
    by then. `position` is that of the next prompt: it counts delivered prompts over the whole run, without
    gaps. `passed_over` counts the turns at which a prompt was not taken, by reason.
    """

    def __init__(
        self,
        sources: Mapping[str | None, Sequence[Row]],
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        seed: int,
        *,
        lag: int = 0,
    ) -> None:
        self.position = 0
        self.passed_over: Counter[PassedOver] = Counter()
        self._config, self._seed, self._lag = config, seed, lag
        self._template = Template(config, tokenizer)
        self._sources = _make_sources(sources, config, seed)
        self._history = History(config.skip_solved, config.solved)
        self._digest: str | None = None
        _warn_duplicates(list(chain.from_iterable(sources.values())))

    def next(self) -> Prompt | None:
        """The next prompt, None at the end of the last epoch. UserError when a whole pass finds every prompt
        too long.
        """
        self._history.reveal(self.position - self._lag)
        while going := [source for source in self._sources if not source.has_ended]:
            prompt = self._next_of(self._choose(going))
            if prompt is not None:
                self.position += 1
                return prompt
        return None

    def record(self, prompt: Prompt, accuracy: float) -> None:
        """A step has consumed the prompt's group; to be called for each, in stream order."""
        self._history.record(prompt.position, prompt.row, accuracy)

    def metrics(self) -> dict[str, float]:
        """How far the data have been gone through, under public names (docs/metrics.md)."""
        num_rows = sum(len(source.rows) for source in self._sources)
        return {
            "data/epochs": sum(source.turn for source in self._sources) / num_rows,
            "data/seen": self._history.num_seen / num_rows,
            "data/solved": self._history.num_solved / num_rows,
            "data/passed_over_long": self.passed_over["long"],
            "data/passed_over_solved": self.passed_over["solved"],
            "data/passed_over_pool": self.passed_over["pool"],
        }

    def state(self) -> dict[str, Any]:
        """The cursor and the history as JSON values."""
        return {
            "position": self.position,
            "turns": [source.turn for source in self._sources],
            "passed_over": dict(self.passed_over),
            "history": self._history.state(),
            **self._identity(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`. UserError when the data, the seed or shuffling differ: positions would
        mean other prompts.
        """
        remedies = {
            "data": "data.path (or data.sources) holds other problems than the run was started with",
            "seed": "run.seed differs from the run's",
            "shuffle": "data.shuffle differs from the run's",
        }
        for key, value in self._identity().items():
            if state[key] != value:
                raise UserError(
                    f"cannot resume the prompt stream: {remedies[key]} ({state[key]!r} then, {value!r} now); "
                    "restore it, or start a new run with another run.dir"
                )
        self.position, self.passed_over = state["position"], Counter(state["passed_over"])
        for source, turn in zip(self._sources, state["turns"], strict=True):
            source.turn = turn
        self._history.load_state(state["history"])

    def _identity(self) -> dict[str, Any]:
        if self._digest is None:
            digest = hashlib.sha256()
            for source in self._sources:
                digest.update(f"{source.name} {len(source.rows)} ".encode())
                for row in source.rows:
                    text = f"{len(row.prompt)} {len(row.answer)} {row.prompt}{row.answer}"
                    digest.update(text.encode("utf-8", "surrogatepass"))
            self._digest = digest.hexdigest()[:16]
        return {"data": self._digest, "seed": self._seed, "shuffle": self._config.shuffle}

    def _choose(self, sources: Sequence[Source]) -> Source:
        """Whose turn it is at this position, by weight."""
        if len(sources) == 1:
            return sources[0]
        chance = random.Random(f"sources/{self._seed}/{self.position}")
        return chance.choices(sources, [source.weight for source in sources])[0]

    def _next_of(self, source: Source) -> Prompt | None:
        """The next prompt of this source; None when it ends before there is one."""
        limit, too_long = self._config.max_prompt_tokens, set[int]()
        for _ in range((self._config.skip_solved + MOST_PASSES) * len(source.rows)):
            if source.has_ended:
                return None
            turn, index = source.turn, source.take_turn()
            known = self._history.of(source.first + index)
            if known is not None and (reason := self._passes_over(source, turn, known)):
                self.passed_over[reason] += 1
                continue
            prompt = self._render(source, index)
            if len(prompt.tokens) <= limit:
                return prompt
            self._pass_over_long(source, index, len(prompt.tokens))
            too_long.add(index)
            if len(too_long) == len(source.rows):
                raise UserError(
                    f"{source.where}: all {len(source.rows)} prompts are longer than "
                    f"data.max_prompt_tokens={limit}; raise it (and batch.max_tokens with it) or shorten "
                    f"data.template and data.few_shot"
                )
        raise UserError(
            f"{source.where}: no prompt was taken in {MOST_PASSES} passes; raise the weights of data.pools"
        )

    def _passes_over(self, source: Source, turn: int, known: Known) -> PassedOver | None:
        """Why a row that was seen before is not taken at this turn."""
        if known.rest:
            known.rest -= 1
            return "solved"
        weight = next((p.weight for p in self._config.pools if known.pass_rate <= p.up_to), 1.0)
        chance = random.Random(f"pools/{source.key}/{turn}") if weight < 1 else None
        return "pool" if chance and chance.random() >= weight else None

    def _pass_over_long(self, source: Source, index: int, num_tokens: int) -> None:
        self.passed_over["long"] += 1
        number = self.passed_over["long"]
        if str(number).strip("0") == "1":  # the 1st, 10th, 100th ...
            log.warning(
                f"{source.where} row {index}: {num_tokens} tokens exceed "
                f"data.max_prompt_tokens={self._config.max_prompt_tokens}; skipped ({number} so far)"
            )

    def _render(self, source: Source, index: int) -> Prompt:
        row = source.rows[index]
        text, tokens = self._template.prompt(row.prompt)
        if not tokens:
            raise UserError(
                f"{source.where} row {index}: the tokenizer makes no tokens of {text!r}; delete the row or "
                f"change data.template"
            )
        return Prompt(
            position=self.position,
            row=source.first + index,
            text=text,
            answer=row.answer,
            tokens=tokens,
            rule=row.rule,
            source=source.name,
            fields=row.fields,
        )


def _make_sources(rows: Mapping[str | None, Sequence[Row]], config: DataConfig, seed: int) -> list[Source]:
    weights = {source.label: source.weight for source in config.sources}
    sources, first = [], 0
    for name, its_rows in rows.items():
        if not its_rows:
            raise UserError("data.path has no rows; give it at least one problem")
        key = f"prompts/{seed}" if name is None else f"prompts/{seed}/{name}"
        weight = 1.0 if name is None else weights[name]
        sources.append(Source(name, its_rows, first, weight, key, config.shuffle, config.epochs))
        first += len(its_rows)
    return sources


def _warn_duplicates(rows: Sequence[Row]) -> None:
    answers: dict[str, str] = {}
    conflicts = {row.prompt for row in rows if answers.setdefault(row.prompt, row.answer) != row.answer}
    distinct = len(answers)
    if distinct == len(rows):
        return
    log.warning(
        f"data: {len(rows)} rows hold only {distinct} distinct prompts, so one epoch is "
        f"{len(rows) / distinct:.3g} passes "
        "over them (DAPO-Math-17k repeats every prompt 100 times). All rows stay; tools/download_data.py "
        "--dedup drops repeats."
        + (f" {len(conflicts)} prompts have more than one answer." if conflicts else "")
    )
