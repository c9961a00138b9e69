"""Forward and backward of one micro-batch on meta tensors: what autograd keeps between them, which the table
(activations.py) is held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from megatron_dapo.config import RunConfig
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.planning.activations import CPU_LAYERS, GPU_LAYERS, one_micro_batch
from megatron_dapo.policy import model as model_file
from megatron_dapo.policy.forward import MicroBatch, response_logprobs, run_model
from megatron_dapo.weights.hf import DTYPES

META = torch.device("meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class OnePass:
    """Bytes that a rank keeps of one micro-batch that is full of one sample. autograd: as it has them with
    the local layers; local, te: by the table, of these and of TransformerEngine's layers. without_gradient:
    parameters that the backward pass did not reach.
    """

    autograd: int
    local: float
    te: float
    without_gradient: int

    def bytes(self) -> dict[str, float]:
        return {"autograd": self.autograd, "local_table": self.local, "te_table": self.te}


class SavedTensors:
    """Bytes that autograd keeps between forward and backward, every storage once, parameters left out."""

    def __init__(self, parameters: Any) -> None:
        self._own = {p.untyped_storage()._cdata for p in parameters}
        self._kept: dict[int, Any] = {}  # holding the storages, so that no number is given twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._kept[storage._cdata] = storage
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())


class _OnMeta(TorchFunctionMode):
    """Attention by the kernel that a CPU takes, which keeps no scores; on meta torch would take the one that
    does.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return flash(query, key, value, 0.0, True)[0]
        return func(*args, **(kwargs or {}))


def can_run(config: RunConfig, model: ModelSpec) -> bool:
    """Whether local layers run on meta tensors: with experts shapes depend on what the router says, and
    under context parallelism every rank would gather all keys, which no GPU's layers do.
    """
    return not model.num_experts and config.layout.context_parallel == 1


def run_on_meta(config: RunConfig, model: ModelSpec, stage: int, chunks: list[Any]) -> OnePass | None:
    """Of the first rank of the stage, whose model chunks these are, in its fake process groups."""
    if not can_run(config, model):
        return None
    parameters, reached = [p for _, p in model_file.named_shards(chunks)], set()
    hooks = [p.register_hook(lambda grad, number=n: reached.add(number)) for n, p in enumerate(parameters)]
    kept = sum(_one_chunk(config, model, stage, chunk, parameters) for chunk in chunks)
    for hook in hooks:
        hook.remove()
    tables = {
        name: one_micro_batch(config, model, stage, layers=layers)
        for name, layers in (("local", CPU_LAYERS), ("te", GPU_LAYERS))
    }
    return OnePass(autograd=kept, without_gradient=len(parameters) - len(reached), **tables)


def _one_chunk(
    config: RunConfig, model: ModelSpec, stage: int, chunk: Any, parameters: Sequence[torch.Tensor]
) -> int:
    """Bytes that its forward pass keeps; then its backward pass."""
    layout, gpt = config.layout.to_layout(), model_file.unwrapped(chunk)
    groups = gpt.pg_collection
    session: Any = SimpleNamespace(tp_rank=0, tp_group=groups.tp, cp_group=groups.cp)
    micro = micro_batch(config.batch.max_tokens)
    if not gpt.pre_process:
        rows = config.batch.max_tokens // (layout.tp if layout.sp else 1)
        shape, dtype = (rows, 1, model.hidden_size), DTYPES[config.model.dtype]
        gpt.set_input_tensor(torch.empty(shape, dtype=dtype, device=META, requires_grad=True))
    on_meta = mock.patch.object(torch.cuda, "current_device", lambda: META)
    with on_meta, _OnMeta():
        with SavedTensors(parameters) as saved:
            out = run_model(chunk, micro, session)
            if gpt.post_process:
                weight = model_file.output_weight(chunk)
                sizes = {"vocab_size": model.vocab_size, "temperature": config.rollout.temperature}
                out, _ = response_logprobs(out, weight, micro, session, **sizes)
        kept = saved.num_bytes
        out.backward(torch.empty_like(out))
    return kept


def micro_batch(tokens: int) -> MicroBatch:
    """One sequence, all of whose tokens are trained. Its bounds are real."""
    whole = torch.empty(tokens, dtype=torch.int64, device=META)
    real = torch.empty(tokens, device=META)
    return MicroBatch(
        tokens_1T=whole[None],
        positions_1T=whole[None],
        bounds=torch.tensor([0, tokens], dtype=torch.int32),
        max_length=tokens,
        num_samples=1,
        rows_R=whole,
        labels_R=whole,
        advantages_R=real,
        streams_R={},
        fresh_R=whole,
        samples_R=whole,
        flat_R=whole,
    )
