"""The table that a worker makes beside the model that it serves, in a pretended world."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed
from support.sink_models import Checkpoint, make_checkpoint

from megatron_dapo.sync.sinks import SinkTable


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe", tied=True)


def live_model(vllm_config) -> torch.nn.Module:
    """As vLLM's loader leaves it, in the live configuration's own registers."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(vllm_config.model_config.dtype):
        return initialize_model(vllm_config)


def test_baking_changes_nothing_of_the_live_model(checkpoint):
    from vllm.config import CompilationMode
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    from megatron_dapo.sync.vllm import sinks_pretend
    from megatron_dapo.sync.vllm.sinks_twin import bake_in_worker

    config = sinks_pretend.engine_config(checkpoint.folder, tp=2)
    expected = sinks_pretend.tables_without_engine(config, checkpoint.facts)
    with sinks_pretend.pretend(config, 1):
        model = live_model(config)
        context = config.compilation_config.static_forward_context
        layers, ropes = dict(context), dict(rotary_embedding._ROPE_DICT)
        moe_layers = list(config.compilation_config.static_all_moe_layers)
        tensors = {name: (tensor, tensor.data_ptr()) for name, tensor in model.named_parameters()}
        noted = {layer: get_layerwise_info(layer).restore_metadata for layer in model.modules()}
        config.compilation_config.mode = CompilationMode.VLLM_COMPILE  # as an engine that is not eager

        table = bake_in_worker(model, config, checkpoint.facts)

        assert config.compilation_config.static_forward_context is context and len(layers) == 4
        assert (
            all(context[name] is layer for name, layer in layers.items()) and context.keys() == layers.keys()
        )
        assert config.compilation_config.static_all_moe_layers == moe_layers and len(moe_layers) == 2
        assert ropes == rotary_embedding._ROPE_DICT and ropes
        assert config.compilation_config.mode == CompilationMode.VLLM_COMPILE
        assert all(tensors[n][0] is t and tensors[n][1] == t.data_ptr() for n, t in model.named_parameters())
        assert all(noted[layer] is get_layerwise_info(layer).restore_metadata for layer in model.modules())
    assert table == expected[1] and table.digest == expected[1].digest
    assert table.digest != expected[0].digest
    assert SinkTable.from_json(table.to_json()) == table


def test_parameters_that_vllm_has_repacked_do_not_matter(checkpoint):
    from megatron_dapo.sync.vllm import sinks_pretend
    from megatron_dapo.sync.vllm.sinks_twin import bake_in_worker

    config = sinks_pretend.engine_config(checkpoint.folder)
    with sinks_pretend.pretend(config, 0):
        model = live_model(config)
        before = bake_in_worker(model, config, checkpoint.facts)
        for parameter in model.parameters():
            parameter.data = torch.empty(0)
        assert bake_in_worker(model, config, checkpoint.facts) == before


def test_a_model_that_was_built_otherwise_is_refused(checkpoint):
    from megatron_dapo.sync.vllm import sinks_pretend
    from megatron_dapo.sync.vllm.sinks_twin import bake_in_worker

    config = sinks_pretend.engine_config(checkpoint.folder, dtype="float32")
    other = sinks_pretend.engine_config(checkpoint.folder, dtype="bfloat16")
    with sinks_pretend.pretend(config, 0):
        model = live_model(other)
        with pytest.raises(
            RuntimeError, match=r"parameter lm_head\.weight is .*bfloat16\) in the model and .*float32"
        ):
            bake_in_worker(model, config, checkpoint.facts)


def test_a_checkpoint_of_another_model_is_refused_by_vllms_loader(checkpoint):
    from megatron_dapo.sync.vllm import sinks_pretend

    config = sinks_pretend.engine_config(checkpoint.folder)
    facts = {**checkpoint.facts, "model.norm.weight": ((65,), torch.float32)}
    with pytest.raises(Exception, match="64"):
        sinks_pretend.tables_without_engine(config, facts)
    assert sinks_pretend.tables_without_engine(config, checkpoint.facts)  # nothing is left behind


def test_the_pretended_world_leaves_nothing_behind(checkpoint):
    from vllm.config import get_current_vllm_config_or_none
    from vllm.distributed import parallel_state

    from megatron_dapo.sync.vllm import sinks_pretend

    config = sinks_pretend.engine_config(checkpoint.folder, tp=2, pp=2)
    hook, new_group = sys.excepthook, torch.distributed.new_group
    with pytest.raises(KeyError), sinks_pretend.pretend(config, 3):
        assert parallel_state.get_tp_group().rank_in_group == 1
        assert parallel_state.get_pp_group().rank_in_group == 1
        assert parallel_state.get_pp_group().is_last_rank
        raise KeyError
    assert not torch.distributed.is_initialized()
    assert sys.excepthook is hook and torch.distributed.new_group is new_group
    assert get_current_vllm_config_or_none() is None
