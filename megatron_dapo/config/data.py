"""Section `data`: where prompts come from, how they are written, and in what order they come."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PositiveInt

from megatron_dapo.config.sections import Section


class SourceConfig(Section):
    path: str = Field(description="JSONL or Parquet file, one problem a row.")
    name: str | None = Field(
        default=None, description="In metrics and checkpoints; null: the file's name without its ending."
    )
    weight: float = Field(
        default=1.0, gt=0, description="How many prompts come from this source, against the others' weights."
    )
    prompt_key: str | None = Field(default=None, description="null: data.prompt_key.")
    answer_key: str | None = Field(default=None, description="null: data.answer_key.")

    @property
    def label(self) -> str:
        return self.name or Path(self.path).stem


class PoolConfig(Section):
    up_to: float = Field(
        ge=0,
        le=1,
        description="Highest pass rate of the pool, by a prompt's newest group. The lowest is the highest of "
        "the pool before it; above the last pool prompts are always taken.",
    )
    weight: float = Field(
        gt=0, le=1, description="How often a prompt of the pool is taken when its turn comes."
    )


class DataConfig(Section):
    path: str | None = Field(default=None, description="JSONL or Parquet file, one problem a row.")
    sources: list[SourceConfig] = Field(
        default=[], description="Several files in place of path, mixed by weight (docs/data.md)."
    )
    prompt_key: str = Field(default="prompt", description="Field of a row that holds the problem.")
    answer_key: str = Field(default="answer", description="Field of a row that holds the reference answer.")
    rule_key: str | None = Field(
        default=None,
        description="Field of a row that names its reward rule; rows without it have the run's. null: all.",
    )
    template: str = Field(default="{prompt}", description="Text around the problem; must hold {prompt}.")
    chat: bool = Field(
        default=False, description="Wrap the text as a user message in the tokenizer's chat template."
    )
    few_shot: list[dict[str, str]] = Field(
        default=[], description="Worked examples {prompt, response} put before each problem (chat only)."
    )
    max_prompt_tokens: PositiveInt = Field(
        default=2048, description="Longer prompts are counted and skipped."
    )
    shuffle: bool = Field(
        default=True, description="A new order every epoch, from run.seed; false: file order."
    )
    epochs: PositiveInt | None = Field(
        default=None, description="Passes over the data before the run ends; null: until run.max_steps."
    )
    skip_solved: int = Field(
        default=0,
        ge=0,
        description="Epochs for which a solved prompt is skipped before it is sampled again; 0: never.",
    )
    solved: float = Field(
        default=1.0, gt=0, le=1, description="Pass rate of its newest group at which a prompt is solved."
    )
    pools: list[PoolConfig] = Field(
        default=[],
        description="Difficulty pools from hard to easy: how often prompts that were sampled before are "
        "taken again; empty: always.",
    )
