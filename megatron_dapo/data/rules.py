"""What cannot be right about the data, as small named rules; preflight.py includes all of them."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable

from megatron_dapo.config import RunConfig
from megatron_dapo.data.rows import CheckRule, load_rows, load_sources
from megatron_dapo.errors import UserError

log = logging.getLogger(__name__)


def template_holds_the_problem(config: RunConfig) -> None:
    """The template says where the problem goes."""
    if "{prompt}" not in config.data.template:
        raise UserError(
            f"data.template={config.data.template!r} must hold {{prompt}}, where the problem goes"
        )


def examples_need_a_chat(config: RunConfig) -> None:
    """Worked examples are messages of a chat."""
    if config.data.few_shot and not config.data.chat:
        raise UserError("data.few_shot needs data.chat=true; put the examples into data.template otherwise")


def sources_stand_in_place_of_a_path(config: RunConfig) -> None:
    """Prompts come from one file or from a list of sources."""
    data = config.data
    if data.sources and data.path is not None:
        raise UserError(
            f"data.path={data.path} and data.sources are both set; make the path a source or unset it"
        )


def sources_have_names_of_their_own(config: RunConfig) -> None:
    """Metrics and checkpoints tell sources apart by name."""
    labels = [source.label for source in config.data.sources]
    for label, number in Counter(labels).items():
        if number > 1:
            raise UserError(
                f"data.sources: {number} sources are named {label!r}; give each a name of its own"
            )
        if not re.fullmatch(r"[\w.-]+", label):
            raise UserError(
                f"data.sources: {label!r} is a part of metric names, so it has letters, digits, '_', '.' and "
                f"'-' alone; set the source's name"
            )


def pools_follow_each_other(config: RunConfig) -> None:
    """Each pool begins where the one before it ends."""
    ends = [pool.up_to for pool in config.data.pools]
    if any(later <= earlier for earlier, later in zip(ends, ends[1:], strict=False)):
        raise UserError(f"data.pools: up_to={ends} must grow from pool to pool; put the hardest first")


def files_can_be_read(config: RunConfig, check_rule: CheckRule | None = None) -> None:
    """Training data, and evaluation data where there are some, have a prompt and an answer in every row.
    `check_rule` as in `load_rows`.
    """
    data, path = config.data, config.evaluation.path
    if data.path is None and not data.sources:
        raise UserError(
            "data.path is required: a .jsonl or .parquet file of problems (tools/download_data.py makes one)"
        )
    sources = load_sources(data, check_rule)
    rows = {f"data.path={data.path}" if name is None else name: r for name, r in sources.items()}
    if path is not None:
        keys = data.prompt_key, data.answer_key
        held_out = load_rows(path, *keys, "evaluation.path", data.rule_key, check_rule)
        rows[f"evaluation.path={path}"] = held_out
    for where, its_rows in rows.items():
        if sentence := _repeated_sentence(data.template, [row.prompt for row in its_rows[:100]]):
            log.warning(
                f"data.template adds to every prompt what {where} already says: {sentence!r}; set "
                "data.template='{prompt}', or take it out of the rows (tools/download_data.py --template)"
            )


def _repeated_sentence(template: str, prompts: list[str]) -> str | None:
    """A sentence of at least three words that the template and a prompt have in common; spaces and ends of
    lines are not told apart.
    """
    texts = [" ".join(prompt.split()) for prompt in prompts]
    for sentence in re.split(r"(?<=[.:!?])\s|\n|\{prompt\}", template):
        words = sentence.split()
        if len(words) >= 3 and any(" ".join(words) in text for text in texts):
            return " ".join(words)
    return None


SETTINGS: tuple[Callable[[RunConfig], None], ...] = (
    template_holds_the_problem,
    examples_need_a_chat,
    sources_stand_in_place_of_a_path,
    sources_have_names_of_their_own,
    pools_follow_each_other,
)
