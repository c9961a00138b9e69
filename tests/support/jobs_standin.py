"""What ranks do in the tests of the GPU path without a GPU (support/standin.py starts them)."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

from megatron_dapo.config import RunConfig
from support import jobs_policy, pretend_cuda
from support.cases import PolicyRun, plan
from support.samples import make_samples


def on_gpu_path(jobs: Sequence[tuple[str, dict[str, Any]]]) -> list[Any]:
    """The results of jobs, `module:function`, where all that asks for the CPU's backend gets the GPU's."""
    pretend_cuda.install()
    from megatron_dapo.policy import backend, rules

    check = rules.check

    def check_16_bit(config: RunConfig, spec: Any, *, on_cpu: bool) -> None:
        """fp32 is compared here, though TransformerEngine's packed attention has it on no GPU."""
        if config.model.dtype != "fp32":
            check(config, spec, on_cpu=on_cpu)

    results = []
    with (
        mock.patch.object(backend, "CPU", backend.GPU),
        mock.patch.object(rules, "check", check_16_bit),
        mock.patch.object(jobs_policy, "digest", digest),
    ):
        for job, arguments in jobs:
            module, name = job.split(":")
            results.append(getattr(importlib.import_module(module), name)(**arguments))
    return results


def digest(policy: Any) -> str:
    """As support.jobs_policy.digest, of TransformerEngine's Adam: the step is a setting of the group."""
    sha = hashlib.sha256()

    def add(values: torch.Tensor) -> None:
        sha.update(values.detach().reshape(-1).view(torch.uint8).numpy().tobytes())

    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            add(parameter)
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for group in part.optimizer.param_groups:
            add(torch.tensor(group["step"]))
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                for values in (state.get("master_param", parameter), state["exp_avg"], state["exp_avg_sq"]):
                    add(values)
    return sha.hexdigest()


def quantised(runs: Sequence[PolicyRun], folder: str) -> dict[str, Any]:
    """Of each run, one update and log-probabilities around it; which layers ran in FP8 when; and bytes of FP8
    copies of weights on the device: before the policy is offloaded, meanwhile, and one pass after it is back.
    """
    reports = {}
    for run in runs:
        with jobs_policy.open_policy(run, f"{folder}/{run.name}.store") as policy:
            if policy is not None:
                reports[run.name] = _quantised(policy)
    return reports


def _quantised(policy: Any) -> dict[str, Any]:
    from megatron_dapo.policy.offload import to_device, to_host

    whole = plan(make_samples(), policy.session.layout, num_updates=1, budget="half")
    batch = jobs_policy.part_of(policy, whole)
    before, of_logprobs = _logged(policy, policy.logprobs, batch)
    result, of_update = _logged(policy, policy.update, batch, 0)
    after, copies = policy.logprobs(batch), [_copied_bytes(policy)]
    to_host(policy)
    copies.append(_copied_bytes(policy))
    to_device(policy)
    again = policy.logprobs(batch)
    copies.append(_copied_bytes(policy))
    return {
        "kinds": _kinds(policy),
        "log of log-probabilities": of_logprobs,
        "log of update": of_update,
        "micro_batches": result.num_micro_batches,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "before": before.tolist(),
        "after": after.tolist(),
        "again": again.tolist(),
        "copies": copies,
    }


def _kinds(policy: Any) -> list[str]:
    """Classes of Megatron's that are TransformerEngine's."""
    modules = [module for chunk in policy.chunks for module in chunk.modules()]
    te = "megatron.core.extensions.transformer_engine"
    return sorted({type(module).__name__ for module in modules if type(module).__module__ == te})


def _logged(policy: Any, function: Callable[..., Any], *args: Any) -> tuple[Any, list[list[Any]]]:
    """The function's result, and [layer, linear layer in it, recipe, recomputed, training, times] of what it
    ran in FP8. Layers of the whole model, from 0.
    """
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    names = {}
    for chunk in policy.chunks:
        for layer in (module for module in chunk.modules() if isinstance(module, TransformerLayer)):
            for name, module in layer.named_modules():
                names[module] = (layer.layer_number - 1, name.rpartition(".")[2])
    FP8GlobalStateManager.log.clear()
    result = function(*args)
    times: dict[tuple[Any, ...], int] = {}
    for run in FP8GlobalStateManager.log:
        recipe = (
            type(run.recipe).__mro__[-3].__name__
        )  # TransformerEngine's own, of one that Megatron derived
        key = (*names[run.module], recipe, run.recomputed, run.training)
        times[key] = times.get(key, 0) + 1
    return result, [[*key, count] for key, count in sorted(times.items())]


def _copied_bytes(policy: Any) -> int:
    modules = [module for chunk in policy.chunks for module in chunk.modules()]
    copies = [copy for module in modules for copy in getattr(module, "_fp8_workspaces", {}).values()]
    return sum(copy.numel() * copy.element_size() for copy in copies)
