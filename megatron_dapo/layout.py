"""Layout: how ranks are arranged. Pure arithmetic; no process group is touched here."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dapo.errors import UserError


def round_up(number: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `number`."""
    return -(-number // step) * step


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of every parallel dimension. Ranks are ordered as Megatron-Core orders them: tp fastest, then cp,
    dp, pp.
    """

    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    vpp: int | None = None
    dp: int = 1
    sp: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "cp", "ep", "etp", "pp", "dp"):
            if (size := getattr(self, name)) < 1:
                raise UserError(f"layout.{name}={size} must be at least 1")
        if self.vpp is not None and (self.vpp < 2 or self.pp == 1):
            raise UserError(
                f"layout.virtual_pipeline_parallel={self.vpp} needs at least 2 chunks and "
                f"layout.pipeline_parallel > 1, got {self.pp}; "
                "set it to null for one chunk a stage"
            )
        if (self.tp * self.cp * self.dp) % (self.ep * self.etp):
            raise UserError(
                f"layout.expert_parallel={self.ep} x layout.expert_tensor_parallel={self.etp} does not "
                f"divide the ranks of a pipeline "
                f"stage, tensor_parallel {self.tp} x context_parallel {self.cp} x data_parallel {self.dp} = "
                f"{self.tp * self.cp * self.dp}, "
                "which hold the experts; change one of them"
            )
        if self.sp and self.tp == 1:
            raise UserError(
                "layout.sequence_parallel=true needs layout.tensor_parallel > 1; with one tensor rank "
                "nothing is split"
            )

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def num_stages(self) -> int:
        """Model chunks from the first layer to the last."""
        return self.pp * (self.vpp or 1)

    @property
    def micro_batch_multiple(self) -> int:
        """The interleaved schedule takes micro-batches in rounds of one per stage."""
        return self.pp if self.vpp else 1

    @property
    def sequence_multiple(self) -> int:
        """Tokens that every sequence is padded to a multiple of: context parallelism cuts it into 2 cp
        chunks.
        """
        return 2 * self.cp if self.cp > 1 else 1

    def coordinates(self, rank: int) -> Coordinates:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(tp=tp, cp=cp, dp=dp, pp=pp)

    def rank(self, at: Coordinates) -> int:
        return ((at.pp * self.dp + at.dp) * self.cp + at.cp) * self.tp + at.tp

    def check_world_size(self, world_size: int) -> None:
        if world_size != self.world_size:
            raise UserError(
                f"{world_size} ranks were started but layout needs tensor_parallel {self.tp} x "
                f"context_parallel {self.cp} x "
                f"pipeline_parallel {self.pp} x data_parallel {self.dp} = {self.world_size}; change the "
                f"layout or the number of processes"
            )

    def check_model(
        self,
        *,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        hidden_size: int,
        ffn_size: int,
        num_experts: int = 0,
    ) -> None:
        """Refuse a model that this layout cannot split evenly. `ffn_size` is that of one expert, if there are
        experts.
        """
        if not num_experts and (self.ep > 1 or self.etp > 1):
            raise UserError(
                f"layout.expert_parallel={self.ep} and expert_tensor_parallel={self.etp} need a model with "
                f"experts; set both to 1"
            )
        if num_experts and self.tp > 1 and not self.sp:
            raise UserError(
                f"layout.tensor_parallel={self.tp} of a model with experts needs "
                f"layout.sequence_parallel=true: each token goes to its "
                "experts once; set it"
            )
        for key, parts, name, size in (
            ("tensor_parallel", self.tp, "attention heads", num_heads),
            ("tensor_parallel", self.tp, "key/value heads", num_kv_heads),
            ("tensor_parallel", self.tp, "hidden size", hidden_size),
            (
                "expert_tensor_parallel" if num_experts else "tensor_parallel",
                self.etp if num_experts else self.tp,
                "MLP size",
                ffn_size,
            ),
            ("expert_parallel", self.ep, "experts", num_experts),
        ):
            if size % parts:
                raise UserError(
                    f"layout.{key}={parts} does not divide the model's {size} {name}; "
                    f"use one of {[d for d in range(1, size + 1) if size % d == 0 and d <= 64]}"
                )
        if num_layers % self.num_stages:
            raise UserError(
                f"layout.pipeline_parallel={self.pp} (x virtual {self.vpp or 1}) does not divide the model's "
                f"{num_layers} layers; "
                f"use one of {[d for d in range(1, num_layers + 1) if num_layers % d == 0]} stages"
            )

    def describe(self) -> str:
        """For the console: tensor, pipeline and data parallel sizes always, others where they are not 1."""
        parts = [f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}"]
        for name, size in (("cp", self.cp), ("ep", self.ep), ("etp", self.etp), ("vpp", self.vpp or 1)):
            if size > 1:
                parts.append(f"{name}{size}")
        return " x ".join(parts) + (" + sequence parallel" if self.sp else "")
