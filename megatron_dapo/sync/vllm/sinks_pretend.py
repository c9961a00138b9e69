"""Sink tables without an engine: vLLM's own parallel state, as any rank of a world that does not exist.

For planning, for tests, and to compare digests with the tables of real workers. One process makes the tables
of all ranks, one after another; it must not be part of a torch.distributed world itself.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel, _RegisteredModel

from megatron_dapo.sync.sinks import SinkTable
from megatron_dapo.sync.vllm.sinks_recorder import TensorFacts, record_sinks
from megatron_dapo.sync.vllm.sinks_twin import build_twin, ranks

FAKE = "fake"  # torch's process groups whose collectives do nothing


def engine_config(
    folder: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    expert_parallel: bool = False,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    quantization: dict[str, Any] | None = None,
) -> VllmConfig:
    """The configuration of an engine for the model whose config.json lies in `folder`; nothing else need.
    quantization: in place of what config.json has as quantization_config.
    """
    for name in json.loads((folder / "config.json").read_text())["architectures"]:
        model = ModelRegistry.models.get(name)
        if isinstance(model, _LazyRegisteredModel):  # vLLM would import it in another process, in 20 s
            ModelRegistry.models[name] = _RegisteredModel.from_model_cls(model.load_model_cls())
    return EngineArgs(
        model=str(folder),
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        enable_expert_parallel=expert_parallel,
        dtype=dtype,
        hf_overrides={"quantization_config": quantization} if quantization else {},
        skip_tokenizer_init=True,
        enforce_eager=True,
    ).create_engine_config()


def tables_without_engine(vllm_config: VllmConfig, tensors: TensorFacts) -> list[SinkTable]:
    """The tables of all workers of such an engine by rank, for a checkpoint of these tensors."""
    tables = []
    for rank in range(vllm_config.parallel_config.world_size):
        with pretend(vllm_config, rank), without_fp8_kernels():
            tables.append(record_sinks(build_twin(vllm_config), tensors, ranks(vllm_config)))
    return tables


@contextlib.contextmanager
def pretend(vllm_config: VllmConfig, rank: int) -> Iterator[None]:
    """vLLM's parallel state is that of `rank` of the engine, and no other rank is needed for it."""
    parallel = vllm_config.parallel_config
    new_group, hook = dist.new_group, sys.excepthook
    dist.init_process_group(FAKE, store=FakeStore(), rank=rank, world_size=parallel.world_size)
    try:
        with (
            set_current_vllm_config(vllm_config),
            mock.patch.object(dist, "new_group", lambda ranks=None, **_: new_group(ranks, backend=FAKE)),
            mock.patch.object(parallel_state, "GroupCoordinator", QuietGroup),
            mock.patch.object(parallel_state, "_node_count", lambda group: 1),
        ):
            parallel_state.init_distributed_environment(parallel.world_size, rank, "env://", 0, FAKE)
            parallel_state.initialize_model_parallel(
                parallel.tensor_parallel_size, parallel.pipeline_parallel_size, backend=FAKE
            )
            yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
        sys.excepthook = hook  # init_process_group has put the rank before every traceback


@contextlib.contextmanager
def without_fp8_kernels() -> Iterator[None]:
    """vLLM builds layers in FP8 without kernels: this machine may have none, and a table needs none."""
    with (
        mock.patch.object(fp8, "init_fp8_linear_kernel"),
        mock.patch.object(fp8, "select_fp8_moe_backend", return_value=(None, None)),
    ):
        yield


class QuietGroup(parallel_state.GroupCoordinator):
    """A group of ranks without the means to talk to each other."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options |= {"use_device_communicator": False, "use_message_queue_broadcaster": False}
        super().__init__(*args, **options)
