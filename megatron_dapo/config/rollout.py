"""The rollout section: the vLLM servers, and how responses are sampled from them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from megatron_dapo.config.sections import Section


class RolloutConfig(Section):
    engines: PositiveInt = Field(default=1, description="Number of vLLM servers on every host.")
    colocated: bool = Field(
        default=True,
        description="Engines run on the hosts of the policy's ranks; false: on none of them, but on those "
        "that join with python -m megatron_dapo.serve, which hosts may do either way.",
    )
    tensor_parallel: PositiveInt = Field(default=1, description="Tensor-parallel size of each server.")
    max_tokens: PositiveInt = Field(default=1024, description="Longest response, tokens (the paper's L_max).")
    temperature: float = Field(
        default=1.0, gt=0, description="Sampling temperature; training divides its logits by it too."
    )
    seeded: bool = Field(
        default=False,
        description="Give every request a seed made of run.seed, prompt and sample: repeatable runs.",
    )
    base_port: int | None = Field(
        default=None, description="Engine i listens on base_port + i; null picks free ports."
    )
    python: str | None = Field(
        default=None,
        description="Python interpreter that runs the servers, on every host, with vLLM and this package "
        "installed; null: the one that runs the policy.",
    )
    load_format: Literal["dummy", "auto"] = Field(
        default="dummy",
        description="What the servers start with: 'dummy' weights, since the first push brings all of them, "
        "or 'auto': they read the checkpoint.",
    )
    quantization: Literal["fp8_block"] | None = Field(
        default=None,
        description="fp8_block: the servers hold linear layers in FP8 with a scale for each block of 128 x "
        "128, which the policy's ranks make of their bf16 weights at every push: about half the memory, and "
        "half the bytes. Needs GPUs, model.dtype=bf16 and load_format=dummy. null: off.",
    )
    sleep: Literal["auto"] | bool = Field(
        default="auto",
        description="Engines give the memory of weights and cache back while the policy trains, and its "
        "optimizer state and gradients leave the GPU while they generate; needs colocated and "
        "sampling.max_age=0. auto: so on GPUs where these are so.",
    )
    memory_utilization: float = Field(
        default=0.8, gt=0, le=1, description="vLLM's share of GPU memory (GPU only)."
    )
    cpu_kv_cache_gib: PositiveInt = Field(default=1, description="KV cache of each server, GiB (CPU only).")
    inflight_updates: bool = Field(
        default=True,
        description="With sampling.max_age >= 1 and not seeded, running responses go on over a weight push: "
        "they stand still, and then use the new weights; false: the push waits until they have ended.",
    )
    max_concurrency: PositiveInt = Field(
        default=256,
        description="Sequences one engine runs at once; more are not sent to it until one has ended.",
    )
    start_timeout_s: float = Field(
        default=300, gt=0, description="How long a server may take to become healthy."
    )
    progress_timeout_s: float = Field(
        default=30,
        gt=0,
        description="An engine that makes no new token for this long while requests are in flight is taken "
        "for dead; so is one that does not answer a call of a weight push within it. Engines report their "
        "tokens twice a second: below 3 a busy engine may look dead.",
    )
    min_engines: PositiveInt = Field(
        default=1, description="The run goes on while this many engines live; fewer stop it."
    )
    max_restarts: int = Field(
        default=2, ge=0, description="Restarts of dead engines in one hour, all engines together."
    )
    extra_args: list[str] = Field(
        default=[], description="More arguments for the vLLM server, as on its command line."
    )
