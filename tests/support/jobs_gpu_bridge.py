"""What a rank does in tests/gpu/test_gpu_megatron_bridge.py: megatron-bridge's conversion, both ways."""

from __future__ import annotations

from pathlib import Path

import torch


def convert(model: str, folder: str) -> None:
    """Write the parameters that megatron-bridge makes of a Hugging Face folder to `folder`/megatron.pt, and
    what it makes of these to `folder`/hf.pt, both by name.
    """
    from megatron.bridge import AutoBridge  # type: ignore[import-not-found]

    bridge = AutoBridge.from_hf_pretrained(model)
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.tensor_model_parallel_size = provider.pipeline_model_parallel_size = 1
    provider.params_dtype = provider.pipeline_dtype = torch.bfloat16
    provider.bf16, provider.gradient_accumulation_fusion = True, False
    provider.finalize()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    [chunk] = chunks
    parameters = {name.removeprefix("module."): p.detach().cpu() for name, p in chunk.named_parameters()}
    torch.save(parameters, Path(folder) / "megatron.pt")
    back = {name: weight.detach().cpu() for name, weight in bridge.export_hf_weights(chunks, cpu=True)}
    torch.save(back, Path(folder) / "hf.pt")
