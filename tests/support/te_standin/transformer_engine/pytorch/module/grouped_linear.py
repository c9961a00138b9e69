"""The linear layers of several experts, on tokens sorted by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .base import TransformerEngineBaseModule, assert_dim_for_fp8_exec, divide, mark_parallel, refuse


class _WithValues(torch.autograd.Function):
    """`used` for the products, with its gradient going to `weight`."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        return used.view_as(used)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


class GroupedLinear(TransformerEngineBaseModule):
    """weight0, weight1, ... [out_features, in_features]. It sends nothing: who dispatches tokens to experts
    does.
    """

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
    ) -> None:
        super().__init__()
        refuse(
            bias=bias,
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            user_buffers=ub_overlap_rs or ub_overlap_ag,
            delay_wgrad_compute=delay_wgrad_compute,
        )
        assert parallel_mode in ("column", "row", None), f"parallel_mode {parallel_mode} not supported"
        self.num_gemms, self.parallel_mode, self.use_bias = num_gemms, parallel_mode, bias
        self.rng_tracker_name, self.save_original_input = rng_tracker_name, save_original_input
        self._join(tp_group, tp_size)
        self.in_features = divide(in_features, self.tp_size) if parallel_mode == "row" else in_features
        self.out_features = divide(out_features, self.tp_size) if parallel_mode == "column" else out_features
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        like = {"device": device, "dtype": params_dtype or torch.get_default_dtype()}
        init = init_method or (lambda values: torch.nn.init.normal_(values, 0.0, 0.023))
        for i in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **like))
            tracker = get_rng_state_tracker
            self.register_parameter(f"weight{i}", weight, init_fn=init, get_rng_state_tracker=tracker)
            setattr(self, f"bias{i}", torch.empty(0, **like))
        self.reset_parameters(defer_init=device == "meta")
        mark_parallel(list(self.parameters(recurse=False)), 1 if parallel_mode == "row" else 0)

    def forward(
        self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> torch.Tensor:
        """`m_splits`: tokens of each expert."""
        assert len(m_splits) == self.num_gemms, "Number of splits should match number of GEMMs."
        with self.prepare_forward(inp, self.num_gemms) as inp:
            parts = inp.view(-1, self.in_features).split([int(size) for size in m_splits])
            products = []
            for i, part in enumerate(parts):
                weight = getattr(self, f"weight{i}")
                if self.fp8:
                    assert_dim_for_fp8_exec(part, weight)
                used = _WithValues.apply(weight, self._weight_of_pass(f"weight{i}", is_first_microbatch))
                products.append(part @ used.t())
            out = torch.cat(products)
        return out.view(*inp.shape[:-1], out.shape[-1])  # an expert's rank may have no token
