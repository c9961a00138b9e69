"""A policy of one rank on the CPU in fp32, without a run around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dapo import preflight
from megatron_dapo.config import RunConfig


def one_rank_policy(model: Path, max_tokens: int, overrides: Sequence[str]) -> Any:
    """Of the Hugging Face checkpoint `model`; micro-batches have at most `max_tokens` tokens."""
    from megatron_dapo.objectives import make_objective
    from megatron_dapo.policy import session as session_file
    from megatron_dapo.policy.backend import CPU
    from megatron_dapo.policy.step import Policy

    settings = [
        f"model.path={model}",
        "model.dtype=fp32",
        "run.device=cpu",
        f"batch.max_tokens={max_tokens}",
        "data.max_prompt_tokens=1",
        "rollout.max_tokens=1",
    ]
    config = RunConfig.load(None, [*settings, *overrides])
    preflight.check_training(config)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    session = session_file.start(config.layout.to_layout(), CPU)
    return Policy(config, session, make_objective(config.objective, max_age=config.sampling.max_age))
