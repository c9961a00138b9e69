"""The whole configuration of a run: strict, documented on the field, never rewritten.

    RunConfig.load("examples/configs/tiny.yaml", ["optimizer.lr=1e-4", "run.max_steps=20"])

Reading checks each field alone: unknown keys raise with the nearest valid name. What the fields may be
together, and with this model on this machine, is checked by preflight.py. Sizes are counted in what the
name says (tokens, prompts, steps, updates); times end in `_s`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from pydantic import ValidationError

from megatron_dapo.config.data import DataConfig, PoolConfig, SourceConfig
from megatron_dapo.config.objective import KINDS, AnyObjective, DapoConfig, ObjectiveSection, kind_of
from megatron_dapo.config.objective_models import DpoConfig, PpoConfig
from megatron_dapo.config.reward import RewardConfig
from megatron_dapo.config.rollout import RolloutConfig
from megatron_dapo.config.sampling import SamplingConfig
from megatron_dapo.config.sections import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    Fp8Config,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    ReportConfig,
    RunSection,
    Section,
    SyncConfig,
)
from megatron_dapo.errors import UserError

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "DapoConfig",
    "DataConfig",
    "DpoConfig",
    "EvaluationConfig",
    "Fp8Config",
    "LayoutConfig",
    "ModelConfig",
    "ObjectiveSection",
    "OptimizerConfig",
    "PolicyConfig",
    "PpoConfig",
    "PoolConfig",
    "ReportConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "RunSection",
    "SamplingConfig",
    "Section",
    "SourceConfig",
    "SyncConfig",
    "nested_sections",
    "register_objective",
    "valid_keys",
]


class RunConfig(Section):
    model: ModelConfig
    layout: LayoutConfig = LayoutConfig()
    policy: PolicyConfig = PolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    objective: AnyObjective = DapoConfig()
    sync: SyncConfig = SyncConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    run: RunSection = RunSection()

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
        """Read a YAML file, apply `section.key=value` overrides in order, validate every field.

        UserError names key, value, rule and remedy.
        """
        if path is not None and not Path(path).is_file():
            raise UserError(f"no configuration file at {path}")
        for item in overrides:
            if "=" not in item or item.startswith("-"):
                raise UserError(f"override {item!r} is not of the form section.key=value")
            _parse(partial(OmegaConf.from_dotlist, [item]), f"override {item!r}")
        file = _parse(partial(OmegaConf.load, path), str(path)) if path else OmegaConf.create()
        if not OmegaConf.is_dict(file):
            raise UserError(
                f"{path} holds a list; a configuration is sections of keys (docs/configuration.md)"
            )
        values = _parse(
            lambda: OmegaConf.to_container(
                OmegaConf.merge(file, OmegaConf.from_dotlist(list(overrides))), resolve=True
            ),
            f"configuration {path or ''}".rstrip(),
        )
        return cls.make(values)

    @classmethod
    def make(cls, values: Any) -> RunConfig:
        """Validate every field of a plain dictionary of sections. UserError names all that are wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(
                "configuration: " + "; ".join(_explain(e, values) for e in error.errors())
            ) from error

    def dump(self) -> str:
        """The resolved configuration as YAML; `RunConfig.load` of it gives an equal RunConfig."""
        return OmegaConf.to_yaml(OmegaConf.create(_escape(self.model_dump(mode="json"))))


def register_objective(section: type[ObjectiveSection]) -> None:
    """Let `objective.kind` name this section from now on: the default of its `kind` is the name."""
    KINDS[section.model_fields["kind"].default] = section
    RunConfig.model_rebuild(force=True)


def valid_keys(kind: str | None = None) -> list[str]:
    """Every `section.key`, and `section.part.key` where a key is a section itself.

    Of the objective's keys those of one kind, or of all kinds.
    """
    keys = []
    for name, field in RunConfig.model_fields.items():
        sections = [field.annotation]
        if name == "objective":
            sections = [KINDS[kind]] if kind in KINDS else list(KINDS.values())
        keys += [key for section in sections for key in _keys(name, section)]
    return list(dict.fromkeys(keys))


def nested_sections(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold (`Fp8Config | None` or `Fp8Config`); none for a plain value."""
    kinds = get_args(annotation) or (annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]


def _keys(prefix: str, section: Any) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}.{name}"
        for nested in nested_sections(field.annotation):
            yield from _keys(f"{prefix}.{name}", nested)


def _parse(read: Callable[[], Any], what: str) -> Any:
    """What `read()` returns. Whatever the parsers raise at a malformed text is a UserError of one line."""
    what = what if len(what) < 120 else f"{what[:120]}..."
    try:
        return read()
    except RecursionError as error:
        raise UserError(
            f"cannot read {what}: it is nested too deep; a configuration has three levels"
        ) from error
    except (
        Exception
    ) as error:  # of OmegaConf, of yaml, and what these did not foresee (IndexError, AttributeError)
        raise UserError(f"cannot read {what}: {' '.join(str(error).split())}") from error


def _escape(value: Any) -> Any:
    """So that OmegaConf reads back `${` in a text as these two characters."""
    if isinstance(value, dict):
        return {key: _escape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escape(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _explain(error: Any, values: Any) -> str:
    """One of pydantic's errors as `key=value: rule`, with the nearest valid key for an unknown one."""
    parts = [str(part) for part in error["loc"]]
    kind = None
    if parts[:1] == ["objective"]:
        kind = kind_of(values["objective"])
        if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
            names = " or ".join(repr(name) for name in KINDS)
            if kind is None:
                return f"objective={values['objective']!r}: Input should be a section with a kind, {names}"
            return f"objective.kind={kind!r}: Input should be {names}"
        del parts[1:2]  # pydantic puts the chosen kind between section and key
    where = ".".join(parts)
    if error["type"] == "extra_forbidden":
        keys = valid_keys(kind) if "." in where else list(RunConfig.model_fields)
        nearest = difflib.get_close_matches(where, keys, n=1, cutoff=0.0)[0]
        chosen = f" of objective.kind={kind}" if kind is not None else ""
        return f"unknown key {where}{chosen}; did you mean {nearest}?"
    if error["type"] == "missing":
        return f"{where} is required"
    if error["type"] == "value_error":  # of a section's own rule, which names its key and value
        return f"{where}.{error['ctx']['error']}"
    return f"{where}={error['input']!r}: {error['msg']}"
