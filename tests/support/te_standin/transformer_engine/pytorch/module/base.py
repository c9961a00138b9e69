"""What all layers share: tensor-parallel group, parameters, FP8 state, checks before a forward pass."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..distributed import in_fp8_activation_recompute_phase, is_fp8_activation_recompute_enabled, size_of
from ..quantization import DelayedScalingRecipeState, FP8GlobalStateManager, Run


class TransformerEngineBaseModule(torch.nn.Module):
    """`_fp8_workspaces` holds, by parameter, the weights that FP8 passes use: made in a first micro-batch,
    used as they are in the others. A real layer holds FP8 copies; these are copies in the weight's own type,
    and a stale one shows in the results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tp_group: Any = None
        self.tp_size = 1
        self.tp_group_initialized = False
        self.sequence_parallel = False
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "fp8_group": None}
        self.param_init_meta: dict[str, tuple[Any, Any]] = {}
        self._fp8_workspaces: dict[str, torch.Tensor] = {}

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        self.tp_group, self.tp_group_initialized = tp_group, True

    def _join(self, tp_group: Any, tp_size: int) -> None:
        self.tp_size = tp_size if tp_group is None else size_of(tp_group)
        if tp_group is not None or tp_size == 1:
            self.set_tensor_parallel_group(tp_group)

    def register_parameter(self, name: str, param: Any, **kwargs: Any) -> None:
        super().register_parameter(name, param)
        self.param_init_meta[name] = (kwargs.get("init_fn"), kwargs.get("get_rng_state_tracker"))

    def reset_parameters(self, defer_init: bool | None = False) -> None:
        if defer_init:
            return
        for name, parameter in self.named_parameters(recurse=False):
            init, get_tracker = self.param_init_meta[name]
            with torch.no_grad():
                if get_tracker is None:
                    init(parameter)
                    continue
                tracker_name = getattr(self, "rng_tracker_name", None)
                with get_tracker().fork(*([tracker_name] if tracker_name else [])):
                    init(parameter)

    @contextmanager
    def prepare_forward(self, inp: torch.Tensor, num_gemms: int = 1) -> Iterator[torch.Tensor]:
        """Refuses what the kernels could not do; in an FP8 context, writes the log."""
        assert self.tp_size == 1 or self.tp_group_initialized, "TP group not initialized."
        for name, parameter in self.named_parameters(recurse=False):
            assert parameter.dtype == inp.dtype, (
                f"Data types for parameters must match when outside of autocasted region. Found input dtype: "
                f"{inp.dtype} and {name!r} dtype: {parameter.dtype}"
            )
        self.init_fp8_metadata(num_gemms)
        if self.fp8:
            recomputed = in_fp8_activation_recompute_phase()
            training = torch.is_grad_enabled() or is_fp8_activation_recompute_enabled()
            recipe = FP8GlobalStateManager.get_fp8_recipe()
            FP8GlobalStateManager.log.append(Run(self, recipe, recomputed, training))
        yield inp.contiguous()

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        self.fp8_meta["fp8_checkpoint"] = self.fp8
        if not self.fp8:
            return
        recipe, before = FP8GlobalStateManager.get_fp8_recipe(), self.fp8_meta.get("recipe")
        if before is not None and type(before) is not type(recipe):
            self._fp8_workspaces.clear()
        self.fp8_meta |= {
            "recipe": recipe,
            "num_gemms": num_gemms,
            "fp8_group": FP8GlobalStateManager.get_fp8_group(),
        }
        self._init_delayed()

    def _init_delayed(self) -> None:
        """Three tensors of each product forward (input, weight, output), two backward."""
        recipe, num_gemms = self.fp8_meta["recipe"], self.fp8_meta["num_gemms"]
        if not recipe.delayed():
            return
        for key, tensors in (("scaling_fwd", 3 * num_gemms), ("scaling_bwd", 2 * num_gemms)):
            if key not in self.fp8_meta:
                self.fp8_meta[key] = DelayedScalingRecipeState(
                    torch.ones(tensors), torch.zeros(recipe.amax_history_len, tensors)
                )

    def _weight_of_pass(self, name: str, is_first_microbatch: bool | None) -> torch.Tensor:
        """The values that products of this pass use of a parameter."""
        weight = getattr(self, name).detach()
        if not self.fp8 or is_first_microbatch is None:
            return weight
        if is_first_microbatch or name not in self._fp8_workspaces:
            self._fp8_workspaces[name] = weight.clone()
        return self._fp8_workspaces[name]

    def get_extra_state(self) -> torch.Tensor:
        """Bytes [n]: none outside FP8."""
        if not (self.fp8_meta["fp8_checkpoint"] or self.fp8 or self.fp8_calibration):
            return torch.empty(0, dtype=torch.uint8)
        kinds = (bool, int, float, str, tuple, list)
        plain = {key: value for key, value in self.fp8_meta.items() if isinstance(value, kinds)}
        state = {"recipe": self.fp8_meta["recipe"], "extra_fp8_variables": plain}
        if state["recipe"].delayed():
            for way in ("fwd", "bwd"):
                held = self.fp8_meta[f"scaling_{way}"]
                state |= {f"scale_{way}": held.scale, f"amax_history_{way}": held.amax_history}
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is None or not state.numel():
            return
        found = pickle.loads(state.numpy().tobytes())
        self.fp8_meta |= found["extra_fp8_variables"] | {"recipe": found["recipe"]}
        self._init_delayed()
        if found["recipe"].delayed():
            for way in ("fwd", "bwd"):
                held = self.fp8_meta[f"scaling_{way}"]
                held.scale.copy_(found[f"scale_{way}"])
                held.amax_history.copy_(found[f"amax_history_{way}"])

    def backward_dw(self) -> None:
        """Of delayed weight gradients."""
        raise NotImplementedError("delay_wgrad_compute")


def assert_dim_for_fp8_exec(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert math.prod(tensor.shape[:-1]) % 8 == 0 and tensor.shape[-1] % 16 == 0, (
            "FP8 execution requires the product of all dimensions except the last to be divisible by 8 and "
            f"the last dimension to be divisible by 16, but got tensor with dims={list(tensor.shape)}"
        )


def divide(size: int, parts: int) -> int:
    assert size % parts == 0, f"{size} is not divisible by {parts}"
    return size // parts


def mark_parallel(parameters: Sequence[torch.nn.Parameter], dim: int) -> None:
    """As Megatron finds shards of a weight."""
    for parameter in parameters:
        parameter.tensor_model_parallel = True
        parameter.partition_dim, parameter.partition_stride = dim, 1


def refuse(**options: Any) -> None:
    """Raise for an option that is on and not modelled."""
    if on := [name for name, value in options.items() if value]:
        raise NotImplementedError(f"the stand-in does not model {', '.join(on)}")


def refuse_user_buffers(sequence_parallel: bool, **flags: bool) -> None:
    """No buffers are ever made: the real layer fails so in its first forward pass."""
    if sequence_parallel and (on := [name for name, value in flags.items() if value]):
        raise AssertionError(f"initialize_ub() must be called before a layer with {', '.join(on)} runs")


def get_workspace() -> torch.Tensor:
    return torch.empty(0)


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype) if zero else torch.empty(shape, dtype=dtype)
