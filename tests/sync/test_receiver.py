"""Weight updates into a real vLLM server, compared with transformers and with its own loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import make_tiny_model
from support.push import checkpoint, plan_for, push, send

from megatron_dapo.environment import DIGEST_VARIABLE, ENGINE_VARIABLE, PLUGIN
from megatron_dapo.sync.vllm import plugin

PROMPT = [10, 20, 30, 40, 50]
STOP = 1


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("other"), tied=True, seed=1, max_positions=1024)


@pytest.fixture
def digests(server):
    """Read the digests that the server wrote under a label."""
    folder = Path(server.environment()[DIGEST_VARIABLE])
    return lambda label: json.loads((folder / f"tp0-{label}.json").read_text())


def greedy_reference(folder: Path, num_tokens: int) -> tuple[list[int], list[float]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, logprobs = list(PROMPT), []
    while len(logprobs) < num_tokens and tokens[-1] != STOP:
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1], dim=-1)
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return tokens[len(PROMPT) :], logprobs


async def check_against_transformers(engine, folder: Path) -> None:
    [got] = await engine.generate(PROMPT, n=1, max_tokens=24, temperature=0.0, weight_version=0)
    tokens, logprobs = greedy_reference(folder, 24)
    assert list(got.tokens) == tokens
    assert list(got.logprobs) == pytest.approx(logprobs, abs=1e-4)


async def test_an_update_equals_loading_the_checkpoint(engine, digests, tiny_model, other_model):
    await check_against_transformers(engine, tiny_model)
    await push(engine, checkpoint(other_model), version=1)
    await check_against_transformers(engine, other_model)  # tied: a stale lm_head would show here
    assert await engine.weight_version() == "1"
    await push(engine, checkpoint(tiny_model), version=2, chunk_bytes=1 << 30)
    await check_against_transformers(engine, tiny_model)

    # The server loaded tiny_model itself when it started: the update must be that, bit for bit, and the other
    # must not.
    assert digests("v2") == digests("load")
    assert digests("v1").keys() == digests("load").keys()
    assert all(digests("v1")[name] != digest for name, digest in digests("load").items())


async def test_one_changed_element_changes_one_digest(engine, digests, tiny_model):
    tensors = checkpoint(tiny_model)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 5] += 1e-7
    await push(engine, tensors, version=3)
    load, now = digests("load"), digests("v3")
    assert {key for key in load if load[key] != now[key]} == {"model.layers.1.self_attn.qkv_proj.weight"}
    await push(engine, checkpoint(tiny_model), version=4)
    assert digests("v4") == load


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        ("model.layers.0.self_attn.k_proj.weight", "layers.0.self_attn.qkv_proj.weight"),
        ("model.layers.1.self_attn.v_proj.bias", "layers.1.self_attn.qkv_proj.bias"),
        ("model.layers.1.mlp.down_proj.weight", "layers.1.mlp.down_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
async def test_a_missing_tensor_is_named_and_may_follow(engine, digests, tiny_model, left_out, named):
    tensors = checkpoint(tiny_model)
    plan = await plan_for(engine, tensors)
    await engine.start_weight_update()
    await send(engine, plan, tensors, version=5, names=tensors.keys() - {left_out})
    with pytest.raises(RuntimeError, match=named):
        await engine.finish_weight_update("5")
    await send(engine, plan, tensors, version=5, names={left_out})
    await engine.finish_weight_update("5")
    assert digests("v5") == digests("load")
    await check_against_transformers(engine, tiny_model)


async def test_a_broken_update_is_refused_and_can_be_repeated(engine, digests, tiny_model, other_model):
    tensors = checkpoint(tiny_model)
    plan = await plan_for(engine, tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    await engine.start_weight_update()
    await send(engine, plan, tensors, version=6, names={name})
    with pytest.raises(RuntimeError, match="twice"):
        await send(engine, plan, tensors, version=6, names={name})

    await engine.start_weight_update()  # what it gets must not survive into the next update
    await send(engine, plan, checkpoint(other_model), version=7, names={name})
    with pytest.raises(RuntimeError, match="update 7 received a chunk of version 8"):
        await send(engine, plan, tensors, version=8, names={"model.norm.weight"})

    await engine.start_weight_update()
    manifest = {"format": 99, "path": "/dev/null"}  # of a trainer with another version of this package
    with pytest.raises(RuntimeError, match=r"Manifest\.format=99 is unknown"):
        await engine.update_weights([manifest])

    await push(engine, tensors, version=8)
    assert digests("v8") == digests("load")
    await check_against_transformers(engine, tiny_model)


def test_importing_the_plugin_is_light():
    code = "import sys, megatron_dapo.sync.vllm.plugin; print('vllm' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_registering_twice_outside_our_servers(monkeypatch):
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    monkeypatch.delenv(ENGINE_VARIABLE, raising=False)
    monkeypatch.setattr(
        plugin, "die_with_parent", lambda: pytest.fail("only servers of ours may die with their parent")
    )
    plugin.register()
    plugin.register()
    assert WeightTransferEngineFactory._registry[PLUGIN]().__name__ == "WeightReceiver"


def test_less_spinning_only_where_it_fits(monkeypatch):
    from vllm.distributed.device_communicators import shm_broadcast

    condition, interval = shm_broadcast.SpinCondition, shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS
    defaults = condition.__init__.__defaults__
    try:
        plugin.spin_less(0.25, 7)
        assert (condition.__init__.__defaults__, shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS) == ((0.25,), 7)
    finally:
        condition.__init__.__defaults__ = defaults
        shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = interval

    class Changed:
        def __init__(self, busy_loop_s=1, other=2):
            pass

    monkeypatch.setattr(shm_broadcast, "SpinCondition", Changed)
    warnings = []
    monkeypatch.setattr(plugin.log, "warning", warnings.append)
    plugin.spin_less()
    assert Changed.__init__.__defaults__ == (1, 2)
    assert interval == shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS
    assert "another shape" in warnings[0]

    # Sleeping early without looking often would lose seconds to lost notifications: neither or both.
    monkeypatch.setattr(shm_broadcast, "SpinCondition", condition)
    monkeypatch.delattr(shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS")
    plugin.spin_less()
    assert condition.__init__.__defaults__ == defaults
