"""A push is all that a server started with dummy weights needs (rollout.load_format): parameters come with it
(tests/sync/test_sink_tables.py), and nothing else of the model has kept a dummy value.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.sink_models import make_checkpoint


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama", "mistral", "qwen3_moe"])
def test_dummy_weights_leave_no_trace_in_buffers(tmp_path, arch):
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    from megatron_dapo.sync.vllm import sinks_pretend
    from megatron_dapo.sync.vllm.sinks_twin import build

    config = sinks_pretend.engine_config(make_checkpoint(tmp_path, arch, tied=False).folder, dtype="float32")
    with sinks_pretend.pretend(config, 0):
        model: Any = build(config)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        assert any("rotary" in name for name in buffers)
        with torch.no_grad():  # memory that is not set may hold the dummy values of the model before this one
            for parameter in model.parameters():
                parameter.fill_(7)
        DummyModelLoader(LoadConfig(load_format="dummy")).load_weights(model, config.model_config)
        kept = [name for name, parameter in model.named_parameters() if (parameter == 7).any()]
        assert kept == [], "what a push does not bring is seen"
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    after = dict(model.named_buffers())
    assert {name for name, before in buffers.items() if not torch.equal(before, after[name])} == set()
