"""Single ranks of a job that does not run: torch's fake process groups and meta tensors, one rank after
another, through the policy's own code. A rank of any size is built, and runs forward and backward on one
micro-batch, in a second or two and without memory.

Layers are the local ones, since TransformerEngine's cannot be constructed without a GPU; they have the same
parameters under other names (weights/names.py has both).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dapo.config import RunConfig
from megatron_dapo.layout import Coordinates, Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.planning.models import has_value_model
from megatron_dapo.planning.passes import OnePass, run_on_meta
from megatron_dapo.planning.sizes import Sizes, is_matrix
from megatron_dapo.policy import backend, fp8_rules, session
from megatron_dapo.policy import model as model_file
from megatron_dapo.policy.optimizer import build_optimizer, optimizer_parts
from megatron_dapo.policy.value import ValueGPT
from megatron_dapo.weights.names import row_of

META = torch.device("meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The first rank of a pipeline stage. value: of a value model beside the policy. one_pass: None where
    local layers cannot run on meta tensors (passes.can_run).
    """

    sizes: Sizes
    value: Sizes | None
    one_pass: OnePass | None


def build_ranks(
    config: RunConfig,
    model: ModelSpec,
    stages: Iterable[int] | None = None,
    of: backend.Backend = backend.CPU,
) -> tuple[Built, ...]:
    """Of these pipeline stages, default all, as Megatron makes them. For a process of its own: the CPU
    backend changes torch for good.
    """
    of.prepare()
    layout = config.layout.to_layout()
    found = []
    for stage in range(layout.pp) if stages is None else stages:
        with fake_rank(layout, layout.rank(Coordinates(tp=0, cp=0, dp=0, pp=stage))):
            found.append(_build(config, model, stage, of))
    return tuple(found)


@contextlib.contextmanager
def fake_rank(layout: Layout, rank: int) -> Iterator[None]:
    """Megatron's process groups as `rank` has them; every collective answers at once."""
    new_group = dist.new_group
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        with mock.patch.object(dist, "new_group", lambda ranks=None, **_: new_group(ranks, backend="fake")):
            session.start_megatron(layout)
        yield
    finally:
        session.stop()


def fake_session(layout: Layout, stage: int, of: backend.Backend) -> Any:
    """What model.build asks a Session for."""
    return SimpleNamespace(
        layout=layout,
        backend=of,
        pp_rank=stage,
        is_first_stage=stage == 0,
        is_last_stage=stage == layout.pp - 1,
        amax_group=None,
    )


class _MetaIsCuda(TorchFunctionMode):
    """A tensor on meta names its type as one on a GPU does, which Megatron's optimizer asks for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_name = func is torch.Tensor.type and isinstance(result, str)
        return result.replace("meta.", "") if is_name else result


def _build(config: RunConfig, model: ModelSpec, stage: int, of: backend.Backend) -> Built:
    sizes, chunks = _trained_model(config, model, stage, of, model_file.HeadlessGPT)
    value = None
    if has_value_model(config):
        untied = dataclasses.replace(model, tied=False)  # as policy/value.py builds it
        value, _ = _trained_model(config, untied, stage, of, ValueGPT)
    return Built(sizes=sizes, value=value, one_pass=run_on_meta(config, model, stage, chunks))


def _trained_model(
    config: RunConfig, model: ModelSpec, stage: int, of: backend.Backend, kind: Any
) -> tuple[Sizes, list[Any]]:
    """With gradient buffers and optimizer, and its chunks."""

    def fields(*arguments: Any) -> dict[str, Any]:
        return of.transformer_fields(*arguments) | {"perform_initialization": False}

    on_meta = dataclasses.replace(of, device=lambda: META, transformer_fields=fields)
    layout, policy = config.layout.to_layout(), config.policy.model_copy(update={"fp8": None})
    of_rank = fake_session(layout, stage, on_meta)
    with mock.patch.object(torch.cuda, "current_device", lambda: META), META, _MetaIsCuda():
        chunks = model_file.with_gradients(
            model_file.build(model, of_rank, policy, config.model.dtype, seed=0, kind=kind),
            policy,
            on_meta,
            distributed_optimizer=config.optimizer.distributed,
        )
        adam = config.optimizer.model_copy(update={"cpu_offload": 0.0})
        optimizer = build_optimizer(adam, chunks, config.model.dtype)
    parameters = dict(model_file.named_shards(chunks))
    buffers = [b for chunk in chunks for b in _buffers(chunk)]
    sizes = Sizes(
        elements=sum(p.numel() for p in parameters.values()),
        weights=_storage_bytes(parameters.values()),
        gradients=_storage_bytes(buffer.grad_data for buffer in buffers),
        optimizer=sum(_state_bytes(part) for part in optimizer_parts(optimizer)),
        quantized=sum(p.numel() for name, p in parameters.items() if _in_fp8(name, config, model)),
    )
    return sizes, chunks


def _in_fp8(name: str, config: RunConfig, model: ModelSpec) -> bool:
    if not name.startswith("decoder.layers."):
        return False
    layer = int(name.split(".")[2])
    return is_matrix(row_of(name)) and fp8_rules.is_quantized(config.policy.fp8, layer, model.num_layers)


def _buffers(chunk: Any) -> list[Any]:
    """Gradient buffers of Megatron's DistributedDataParallel."""
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _state_bytes(part: Any) -> int:
    """Moments, and the fp32 copies of bf16 weights; the step counters, one number a parameter, left out."""
    adam = part.optimizer
    state = [t for of_one in adam.state.values() for t in of_one.values() if t.dim()]
    # of the distributed optimizer, and of the other one for bf16; the one for fp32 has none
    names = ("shard_fp32_from_float16_groups", "fp32_from_float16_groups")
    copies = [t for name in names for group in getattr(part, name, ()) for t in group]
    return sum(t.numel() * t.element_size() for t in (*state, *copies))


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes, every storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())
