"""A linear layer of one tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._products import ParallelProduct
from .base import (
    TransformerEngineBaseModule,
    assert_dim_for_fp8_exec,
    divide,
    mark_parallel,
    refuse,
    refuse_user_buffers,
)


class Linear(TransformerEngineBaseModule):
    """weight [out_features, in_features] of this rank; bias a parameter, or an empty tensor without one."""

    def __init__(
        self,
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
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        refuse(
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            parameters_split=parameters_split,
            delay_wgrad_compute=delay_wgrad_compute,
            symmetric_ar_type=symmetric_ar_type,
        )
        self.rng_tracker_name, self.save_original_input = rng_tracker_name, save_original_input
        self._lay_out(in_features, out_features, parallel_mode, sequence_parallel, tp_group, tp_size)
        refuse_user_buffers(
            self.sequence_parallel,
            ub_overlap_ag=ub_overlap_ag,
            ub_overlap_rs=ub_overlap_rs,
            ub_overlap_rs_dgrad=ub_overlap_rs_dgrad,
            ub_bulk_dgrad=ub_bulk_dgrad,
            ub_bulk_wgrad=ub_bulk_wgrad,
        )
        self._make_weights(bias, return_bias, init_method, get_rng_state_tracker, device, params_dtype)

    def _lay_out(
        self,
        in_features: int,
        out_features: int,
        parallel_mode: str | None,
        sequence_parallel: bool,
        tp_group: Any,
        tp_size: int,
    ) -> None:
        assert parallel_mode in ("column", "row", None), f"parallel_mode {parallel_mode} not supported"
        self._join(tp_group, tp_size)
        self.parallel_mode = parallel_mode
        self.in_features = divide(in_features, self.tp_size) if parallel_mode == "row" else in_features
        self.out_features = divide(out_features, self.tp_size) if parallel_mode == "column" else out_features
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel

    def _make_weights(
        self, bias: bool, return_bias: bool, init_method: Any, tracker: Any, device: Any, dtype: Any
    ) -> None:
        self.use_bias, self.return_bias = bias, return_bias
        self.apply_bias = bias and not return_bias
        like = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **like))
        init_method = init_method or (lambda values: torch.nn.init.normal_(values, 0.0, 0.023))
        self.register_parameter("weight", weight, init_fn=init_method, get_rng_state_tracker=tracker)
        if bias:
            values = torch.nn.Parameter(torch.empty(self.out_features, **like))
            self.register_parameter("bias", values, init_fn=torch.nn.init.zeros_)
        else:
            self.bias = torch.empty(0, **like)
        self.reset_parameters(defer_init=device == "meta")
        mark_parallel([self.weight], 1 if self.parallel_mode == "row" else 0)
        if bias and self.parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel
        elif bias and self.parallel_mode == "column":
            mark_parallel([self.bias], 0)

    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:
        return self._product(inp, is_first_microbatch, None)

    def _product(
        self, inp: torch.Tensor, is_first_microbatch: bool | None, norm_weight: torch.Tensor | None
    ) -> Any:
        assert inp.shape[-1] == self.in_features, "GEMM not possible"
        with self.prepare_forward(inp) as inp:
            if self.fp8:
                assert_dim_for_fp8_exec(inp, self.weight)
            used = self._weight_of_pass("weight", is_first_microbatch)
            bias = self.bias if self.apply_bias else None
            out = ParallelProduct.apply(inp, self.weight, used, bias, norm_weight, self)
        return (out, self.bias) if self.return_bias else out
