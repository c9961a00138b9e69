"""SGD, which no run of the project uses."""

from __future__ import annotations

from typing import Any

import torch


class FusedSGD(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: Any = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool | None = None,
    ) -> None:
        raise NotImplementedError("FusedSGD")
