"""A norm and a linear layer in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .base import TransformerEngineBaseModule, refuse, refuse_user_buffers
from .linear import Linear


class LayerNormLinear(Linear):
    """As Linear, with layer_norm_weight [in_features]. RMSNorm alone."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        TransformerEngineBaseModule.__init__(self)
        refuse(
            layer_norm=normalization != "RMSNorm",
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            return_layernorm_output=return_layernorm_output,
            parameters_split=parameters_split,
            delay_wgrad_compute=delay_wgrad_compute,
            symmetric_ar_type=symmetric_ar_type,
        )
        self.normalization, self.zero_centered_gamma, self.eps = normalization, zero_centered_gamma, eps
        self._lay_out(in_features, out_features, parallel_mode, sequence_parallel, tp_group, tp_size)
        refuse_user_buffers(
            self.sequence_parallel,
            ub_overlap_ag=ub_overlap_ag,
            ub_overlap_rs=ub_overlap_rs,
            ub_overlap_rs_dgrad=ub_overlap_rs_dgrad,
            ub_bulk_wgrad=ub_bulk_wgrad,
            ub_bulk_dgrad=ub_bulk_dgrad,
        )
        like = {"device": device, "dtype": params_dtype or torch.get_default_dtype()}
        weight = torch.nn.Parameter(torch.empty(self.in_features, **like))
        init = torch.nn.init.zeros_ if zero_centered_gamma else torch.nn.init.ones_
        self.register_parameter("layer_norm_weight", weight, init_fn=init)
        self.layer_norm_bias = None
        self._make_weights(bias, return_bias, init_method, get_rng_state_tracker, device, params_dtype)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:
        return self._product(inp, is_first_microbatch, self.layer_norm_weight)
