"""GPUs that a run can be planned for, and what no formula gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_dapo.rollout.simulate_model import H100, Hardware
from megatron_dapo.sync.plan_report import H100 as H100_LINKS
from megatron_dapo.sync.plan_report import Bandwidths

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """speed.memory_bytes: what torch reports as the total. links: of one GPU, in one direction. capability:
    CUDA's compute capability.
    """

    name: str
    speed: Hardware
    links: Bandwidths
    capability: tuple[int, int] = (9, 0)
    per_host: int = 8


# Data sheets: H200 SXM 4.8 TB/s, the FLOP/s and links of the H100; B200 8 TB/s, 2,250 TFLOP/s dense bf16,
# NVLink 1.8 TB/s both directions together, DGX B200 with one adapter of 400 Gb/s for each GPU. Memory: the
# "total capacity" in torch's own out-of-memory messages from such GPUs.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="H100", speed=replace(H100, memory_bytes=79.1 * GIB), links=H100_LINKS),
        Gpu(
            name="H200",
            speed=replace(H100, bytes_per_s=4.8e12, memory_bytes=139.8 * GIB),
            links=replace(H100_LINKS, same_rank=4.8e12 / 2),
        ),
        Gpu(
            name="B200",
            speed=replace(H100, bytes_per_s=8e12, flops_per_s=2250e12, memory_bytes=178.3 * GIB),
            links=Bandwidths(same_rank=8e12 / 2, inside_host=1800e9 / 2, between_hosts=400e9 / 8),
            capability=(10, 0),
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Numbers from experience and from what others have published, not from this code.

    context_gib: CUDA context, libraries' workspaces and NCCL's buffers of a policy rank. engine_gib: all that
    an engine worker has beside weights and KV cache, which it keeps asleep: published logs of vLLM 0.8 to
    0.13 say 1.1 to 4.8 GiB "still in use" (vllm issues 17117, 32714). fragmentation: memory that torch
    reserves beyond what it allocates. send_chunks: chunks of sync.chunk_bytes that a rank packs for other
    hosts at once (docs/bridge.md). busiest_experts: tokens of the rank with the most, over the mean, in a
    model with experts.

    The shares of published figures that are reached: matmul and attention of the FLOP/s, expert_matmul of
    those in the small matrices of experts; memory and links of the bandwidths. passes: how often
    element-wise kernels read or write what a layer keeps, in a forward pass. docs/planning.md compares what
    they lead to with published runs.
    """

    context_gib: float = 2.0
    engine_gib: float = 4.5
    fragmentation: float = 0.05
    send_chunks: float = 1.3
    busiest_experts: float = 1.5
    matmul: float = 0.65
    attention: float = 0.45
    expert_matmul: float = 0.35
    memory: float = 0.7
    links: float = 0.75
    passes: float = 2.0
    to_host_bytes_per_s: float = 50e9  # PCIe 5 x16, one direction
    switch_s: float = 5.0  # engines fall asleep and wake up again


ASSUMED = Assumptions()
