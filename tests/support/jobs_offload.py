"""What ranks do in tests/policy/test_offload.py: updates between which the policy's state leaves the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from support.cases import PolicyRun, plan
from support.jobs_policy import digest, open_policy, part_of
from support.samples import make_samples

NUM_UPDATES = 3


class PretendGpu(TorchFunctionMode):
    """While it is on, every tensor says that it is on a GPU but the copies that `cpu()` makes, which `cuda()`
    copies back. They are known by the address of their memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host: dict[int, torch.Tensor] = {}  # copies, by the address of their memory

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].data_ptr() not in self.host
        if func is torch.Tensor.cpu:
            copy = torch.Tensor.clone(args[0])
            self.host[copy.data_ptr()] = copy
            return copy
        if func is torch.Tensor.cuda:
            copy = torch.Tensor.clone(args[0])
            self.host.pop(args[0].data_ptr(), None)
            return copy
        return func(*args, **(kwargs or {}))


def train(runs: Sequence[PolicyRun], folder: str) -> dict[str, Any]:
    """For each run, digests of weights and optimizer state after every update: `undisturbed`, `offloaded`
    between any two, and `pretending` that there is a GPU. And what was freed meanwhile.
    """
    ways = ("undisturbed", "offloaded", "pretending")
    return {run.name: {how: _updates(run, folder, how) for how in ways} for run in runs}


def save(runs: Sequence[PolicyRun], folder: str) -> dict[str, Any]:
    """Digests of a policy, and of those that load what it saves while its state is away, and before."""
    from megatron_dapo import checkpoint
    from megatron_dapo.policy.offload import to_host

    reports: dict[str, Any] = {}
    for run in runs:
        found = {}
        for when in ("before", "away"):
            run_dir = Path(folder) / f"{run.name}-{when}"
            with open_policy(run, f"{folder}/{run.name}-{when}.store") as policy, PretendGpu() as gpu:
                policy.update(_batch(policy), 0)
                found["saved"] = digest(policy)
                if when == "away":
                    to_host(policy)
                    found["on_host"] = len(gpu.host)
                state = checkpoint.RunState(step=1, rollouts={}) if policy.session.rank == 0 else None
                checkpoint.save(run_dir, policy, state, keep=1)
            with open_policy(run, f"{folder}/{run.name}-{when}-load.store") as policy:
                newest = checkpoint.find(run_dir, "auto")
                assert newest is not None
                checkpoint.load(newest, policy)
                found[when] = digest(policy)
        reports[run.name] = found
    return reports


def _updates(run: PolicyRun, folder: str, how: str) -> dict[str, Any]:
    from megatron_dapo.policy.model import gather_weights
    from megatron_dapo.policy.offload import to_device, to_host

    gpu = PretendGpu() if how == "pretending" else None
    with open_policy(run, f"{folder}/{run.name}-{how}.store") as policy:
        batch, digests, away = _batch(policy), [], []
        for k in range(NUM_UPDATES):
            result = policy.update(batch, k)
            gather_weights(policy.chunks)  # overlapped gathers come with the next forward pass otherwise
            digests.append([digest(policy), result.loss, result.grad_norm])
            if how == "undisturbed":
                continue
            with _on(gpu):
                to_host(policy)
                away.append([_gradient_bytes(policy), len(gpu.host) if gpu else 0])
                to_device(policy)
            assert digest(policy) == digests[-1][0] and _gradient_bytes(policy) > 0, run.name
    return {"digests": digests, "away": away}


def _on(gpu: PretendGpu | None) -> contextlib.AbstractContextManager[Any]:
    return gpu or contextlib.nullcontext()


def _batch(policy: Any) -> Any:
    whole = plan(make_samples(), policy.session.layout, num_updates=NUM_UPDATES, budget="half")
    return part_of(policy, whole)


def _gradient_bytes(policy: Any) -> int:
    return sum(
        buffer.grad_data.untyped_storage().size()
        for chunk in policy.chunks
        for buffer in chunk.buffers + chunk.expert_parallel_buffers
    )
