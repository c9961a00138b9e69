"""The picture that `plan.py memory --plot` writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.planning.hardware import GIB
from megatron_dapo.planning.memory import MemoryPlan
from megatron_dapo.planning.step_time import StepTime
from megatron_dapo.planning.timeline import one_update, timeline


def draw(config: RunConfig, model: ModelSpec, memory: MemoryPlan, seconds: StepTime, out: Path) -> None:
    """Write the PNG, whole or not at all. Above, the fullest GPU over the seconds of a step, what lies there
    on top of each other; each phase is as wide as it takes, and a twentieth of the step at least. Below, the
    GPUs of every pipeline stage over the positions of one update's schedule.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (step, update) = plt.subplots(2, 1, figsize=(11, 9), layout="constrained", height_ratios=(2, 1))
    total = memory.gpu.speed.memory_bytes / GIB
    for axis in (step, update):
        axis.axhline(total, color="black", linestyle="--")
        axis.set(ylabel="GiB", ylim=(0, total * 1.1))
    title = f"{config.model.path}, {config.layout.to_layout().describe()}, {memory.gpu.name}: planned"
    step.set_title(f"{title}; {memory.margin / GIB:.1f} of {total:.1f} GiB stay free", fontsize="small")
    _draw_step(step, memory, seconds, plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    for stage, sizes in one_update(config, model, memory).items():
        update.step(range(len(sizes)), [size / GIB for size in sizes], where="mid", label=f"stage {stage}")
    update.set(xlabel="forward and backward passes of model chunks in one update", xticks=[])
    update.legend(fontsize="small")
    names = dict(zip(*reversed(step.get_legend_handles_labels()), strict=True))
    figure.legend(names.values(), names.keys(), loc="outside right upper", fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.tmp")
    figure.savefig(unfinished, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
    os.replace(unfinished, out)


def _draw_step(axis: Any, memory: MemoryPlan, seconds: StepTime, colours: Any) -> None:
    moments = timeline(memory, seconds)
    names = list(dict.fromkeys(name for moment in moments for name in moment.parts))
    colour = dict(zip(names, colours, strict=False))
    began, ticks = 0.0, []
    for moment in moments:
        width, base = max(moment.seconds, seconds.step / 20), 0.0
        for name, size in moment.parts.items():
            axis.bar(began, size / GIB, width, base, align="edge", color=colour[name], label=name)
            base += size / GIB
        ticks.append((began + width / 2, f"{moment.phase}\n{moment.seconds:,.0f} s"))
        began += width
    axis.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
