"""What leaves a GPU while engines sample on it, and comes back for the next update: the optimizer's state,
that is fp32 master weights and moments, goes to the host; the gradient buffers and FP8 copies of weights are
dropped.

The same of a value model. The models' own weights stay: the push reads them, and so do checkpoints and the
export. A reference model is on the host anyway (policy/reference.py). With
optimizer.cpu_offload the optimizer's state stays where it is: Megatron could not tell, on the way back, what
belongs on the host. On a CPU Megatron's calls run too; they drop the gradients, and leave the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from megatron_dapo.policy.model import drop_quantised_weights, gather_weights
from megatron_dapo.policy.step import Policy

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Memory:
    """Of this process, GiB. allocated: tensors on the GPU; reserved: with what torch keeps for more of them,
    all that no other process can have. On a CPU both are its resident memory.
    """

    allocated: float
    reserved: float

    def __str__(self) -> str:
        return f"{self.allocated:.2f} GiB allocated, {self.reserved:.2f} GiB reserved"


def memory_now(device: torch.device) -> Memory:
    if device.type == "cpu":
        resident = psutil.Process().memory_info().rss / GIB
        return Memory(resident, resident)
    return Memory(torch.cuda.memory_allocated(device) / GIB, torch.cuda.memory_reserved(device) / GIB)


def to_host(policy: Policy) -> None:
    """Collective. Free what the policy needs for updates alone. It can be saved meanwhile, not updated."""
    for model in policy.trained_models():
        gather_weights(model.chunks)  # what is gathered on demand may lie in a gradient buffer until then
        model.optimizer.zero_grad()  # its gradients may be views of the buffers
        for chunk in model.chunks:
            chunk.offload_grad_buffers()
        drop_quantised_weights(model.chunks)
        if not policy.config.optimizer.cpu_offload:
            model.optimizer.offload_to_cpu()
    torch.cuda.empty_cache()


def to_device(policy: Policy) -> None:
    """Undo `to_host`. Gradients are zero then."""
    for model in policy.trained_models():
        if not policy.config.optimizer.cpu_offload:
            model.optimizer.restore_from_cpu()
        for chunk in model.chunks:
            chunk.restore_grad_buffers()
