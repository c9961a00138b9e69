"""AdamW."""

from __future__ import annotations

from typing import Any

import torch

from ..module.base import refuse


class FusedAdam(torch.optim.Optimizer):
    """State of a parameter: exp_avg and exp_avg_sq in fp32; the step is its group's."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        refuse(
            amsgrad=amsgrad,
            coupled_decay=not adam_w_mode,
            capturable=capturable,
            master_weights=master_weights,
            low_precision_state={exp_avg_dtype, exp_avg_sq_dtype} != {torch.float32},
            use_decoupled_grad=use_decoupled_grad,
        )
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        if not self.state[parameter]:
            self.initialize_state(parameter, False)
        state, grad, (beta1, beta2) = self.state[parameter], parameter.grad.float(), group["betas"]
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        fix1, fix2 = 1.0, 1.0
        if group["bias_correction"]:
            fix1, fix2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
        update = (state["exp_avg"] / fix1) / ((state["exp_avg_sq"] / fix2).sqrt() + group["eps"])
        parameter.sub_(group["lr"] * (update + group["weight_decay"] * parameter))
