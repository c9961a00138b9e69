"""How much disk the checkpoints and exports of a run take, known before the first of them."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dapo.model_spec import ModelSpec

if TYPE_CHECKING:
    from megatron_dapo.preflight import Facts

log = logging.getLogger(__name__)
OPTIMIZER_BYTES = 12  # of a parameter: fp32 weight and two moments
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GB = 1e9


def export_bytes(spec: ModelSpec, dtype: str) -> int:
    """Of a Hugging Face checkpoint's weights."""
    return num_parameters(spec) * ITEM_BYTES[dtype]


def checkpoint_bytes(spec: ModelSpec, dtype: str) -> int:
    """Of a checkpoint's tensors: the weights and the optimizer's state."""
    return num_parameters(spec) * (ITEM_BYTES[dtype] + OPTIMIZER_BYTES)


def num_parameters(spec: ModelSpec) -> int:
    from megatron_dapo.weights.names import hf_shapes  # loads torch

    return sum(map(math.prod, hf_shapes(spec).values()))


def checkpoints_have_room(facts: Facts) -> None:
    """The disk of run.dir holds the checkpoints that stay and the one that is being written, and the exports.
    A warning: somebody may make room while the run goes on.
    """
    if facts.planned:
        return
    options, dtype, run_dir = facts.config.checkpoint, facts.config.model.dtype, Path(facts.config.run.dir)
    each, export = checkpoint_bytes(facts.spec, dtype), export_bytes(facts.spec, dtype)
    exports = int(options.export_hf) + ((options.keep_exports or 1) + 1 if options.export_every else 0)
    if facts.config.objective.kind == "ppo":
        each *= 2  # a value model of the same size
    there = len(list(run_dir.glob("checkpoints/step_*")))
    needed = max(options.keep + 1 - there, 1) * each + exports * export
    existing = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        log.warning(
            f"run.dir={run_dir} has {free / GB:.1f} GB free; a checkpoint takes {each / GB:.1f} GB, and "
            f"checkpoint.keep={options.keep} of them with the one that is being written"
            + (f" and {exports} exports of {export / GB:.1f} GB" if exports else "")
            + f" {needed / GB:.1f} GB more; free space, lower checkpoint.keep, or set run.dir to another disk"
        )
