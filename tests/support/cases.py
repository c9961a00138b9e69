"""What the tests of the policy run: layouts by name, and runs of a policy as values that go to the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_dapo.batching.packing import pack
from megatron_dapo.layout import Layout
from megatron_dapo.objectives.base import trained_tokens
from megatron_dapo.types import Batch, Sample

Budget = Literal["one", "half", "all"]
COMMON = ("model.dtype=fp32", "batch.max_tokens=20000")
LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tp=2),
    "tp2_sp": Layout(tp=2, sp=True),
    "pp2": Layout(pp=2),
    "dp2": Layout(dp=2),
    "cp2": Layout(cp=2),
    "ep2": Layout(dp=2, ep=2),
    "pp2_vpp2": Layout(pp=2, vpp=2),
    "tp2_pp2": Layout(tp=2, pp=2),
    "tp2_cp2": Layout(tp=2, cp=2),
    "tp2_sp_cp2": Layout(tp=2, sp=True, cp=2),
    "tp2_sp_pp2": Layout(tp=2, sp=True, pp=2),
    "tp2_sp_pp2_vpp2": Layout(tp=2, sp=True, pp=2, vpp=2),
    "tp2_dp2": Layout(tp=2, dp=2),
    "dp2_cp2": Layout(dp=2, cp=2),
    "tp2_sp_ep2": Layout(tp=2, sp=True, ep=2),
    "tp2_sp_etp2": Layout(tp=2, sp=True, etp=2),
    "tp2_sp_ep2_pp2": Layout(tp=2, sp=True, ep=2, pp=2),
    "tp2_sp_ep2_dp2": Layout(tp=2, sp=True, ep=2, dp=2),
    "tp2_sp_ep2_etp2_dp2": Layout(tp=2, sp=True, ep=2, etp=2, dp=2),
    "ep2_etp2_dp4": Layout(dp=4, ep=2, etp=2),
    "pp2_ep2_cp2": Layout(pp=2, ep=2, cp=2),
    "tp2_pp2_dp2": Layout(tp=2, pp=2, dp=2),
    "pp2_vpp2_cp2_dp2": Layout(pp=2, vpp=2, cp=2, dp=2),
}
KEYS = {
    "tp": "tensor_parallel",
    "sp": "sequence_parallel",
    "pp": "pipeline_parallel",
    "vpp": "virtual_pipeline_parallel",
    "cp": "context_parallel",
    "ep": "expert_parallel",
    "etp": "expert_tensor_parallel",
    "dp": "data_parallel",
}


@dataclass(frozen=True, kw_only=True)
class PolicyRun:
    """A policy to build on the ranks of a layout, and how its samples are split.

    layout: a name of LAYOUTS. overrides: more of the configuration, `section.key=value`. budget: how many
    tokens a micro-batch holds, as in `plan`.
    """

    name: str
    model: str
    layout: str = "tp1"
    overrides: Sequence[str] = ()
    num_updates: int = 1
    budget: Budget = "half"

    def arguments(self) -> list[str]:
        """The command line of its configuration."""
        layout = LAYOUTS[self.layout]
        sizes = [f"layout.{key}={getattr(layout, field)}" for field, key in KEYS.items()]
        sizes = [item.replace("=None", "=null") for item in sizes]
        return [f"model.path={self.model}", *COMMON, *sizes, *self.overrides]


def plan(
    samples: Sequence[Sample],
    layout: Layout,
    *,
    num_updates: int,
    budget: Budget,
    version: int = 0,
    **changed: Any,
) -> Batch:
    """The whole batch. `budget`: 'one' sample per micro-batch, 'half' of the tokens of a rank's share, or
    'all' of them in as few as there may be.
    """
    total = sum(len(s.tokens) for s in samples) / num_updates / layout.dp
    half = max(int(0.6 * total), max(len(s.tokens) for s in samples))
    how = {
        "max_tokens": half if budget == "half" else 20000,
        "min_micro_batches": len(samples) if budget == "one" else 1,
        "multiple": layout.micro_batch_multiple,
        "denominator": trained_tokens,
    }
    return pack(samples, dp=layout.dp, num_updates=num_updates, version=version, **(how | changed))
