"""Loaders of vLLM that are broken on purpose: the checks name what is wrong."""

from __future__ import annotations

import re
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from support.sink_models import Checkpoint, make_checkpoint

from megatron_dapo.sync.sink_checks import problems


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Checkpoint]:
    kinds = {"tied": ("qwen2", True), "untied": ("llama", False), "experts": ("qwen3_moe", False)}
    return {
        kind: make_checkpoint(tmp_path_factory.mktemp(kind), arch, tied=tied)
        for kind, (arch, tied) in kinds.items()
    }


def renamed(kind: str, rename):
    """The model takes every tensor for the one of another name, or for none."""
    from vllm.model_executor.models import llama, qwen3_moe

    model = {"untied": llama.LlamaForCausalLM, "experts": qwen3_moe.Qwen3MoeForCausalLM}[kind]
    load = model.load_weights

    def load_renamed(self, weights):
        return load(self, ((rename(name), tensor) for name, tensor in weights if rename(name)))

    return mock.patch.object(model, "load_weights", load_renamed)


def swapped(kind: str, a: str, b: str):
    return renamed(kind, lambda name: name.replace(a, "?").replace(b, a).replace("?", b))


def dropped():
    return renamed("untied", lambda name: None if name == "model.layers.1.mlp.down_proj.weight" else name)


def v_over_k():
    from vllm.model_executor.layers.linear import QKVParallelLinear

    load = QKVParallelLinear.weight_loader_v2
    return mock.patch.object(
        QKVParallelLinear,
        "weight_loader_v2",
        lambda self, param, weight, part=None: load(self, param, weight, "k" if part == "v" else part),
    )


def columns_of(rank):
    """Row-parallel layers take the columns of `rank(tp_rank)`."""
    from vllm.model_executor.parameter import RowvLLMParameter

    def load(self, loaded_weight):
        size = self.data.shape[self.input_dim]
        self.data.copy_(loaded_weight.narrow(self.input_dim, rank(self.tp_rank) * size, size))

    return mock.patch.object(RowvLLMParameter, "load_row_parallel_weight", load)


def head_not_tied():
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return mock.patch.object(ParallelLMHead, "tie_weights", lambda self, embedding: self)


def expert_skipped():
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    load = RoutedExperts.weight_loader
    return mock.patch.object(
        RoutedExperts,
        "weight_loader",
        lambda self, *args, **options: options.get("expert_id") == 3 or load(self, *args, **options),
    )


BUGS = {
    "a parameter is dropped": ("untied", dropped, r"layers\.1\.mlp\.down_proj\.weight: .* never written"),
    "v is loaded over k": ("tied", v_over_k, "elements are written again by .*v_proj"),
    "all ranks take rank 0's columns": (
        "tied",
        lambda: columns_of(lambda rank: 0),
        r"layers\.0\.mlp\.down_proj\.weight: 1536 of 3072 elements are taken by no rank",
    ),
    "ranks take each other's columns": (
        "tied",
        lambda: columns_of(lambda rank: 1 - rank),
        "down_proj.weight: the tp ranks take their parts out of order",
    ),
    "k and v are swapped": (
        "untied",
        lambda: swapped("untied", "k_proj", "v_proj"),
        "qkv_proj.*out of order",
    ),
    "gate and up are swapped": (
        "untied",
        lambda: swapped("untied", "gate_proj", "up_proj"),
        "gate_up_proj.*out of order",
    ),
    "layers are swapped": (
        "untied",
        lambda: swapped("untied", "layers.0.", "layers.1."),
        r"layers\.0\.mlp\.down_proj\.weight takes elements of model\.layers\.1\.mlp\.down_proj\.weight",
    ),
    "the head is not tied": ("tied", head_not_tied, r"lm_head\.weight: .* never written"),
    "the checkpoint has a head of its own": ("tied", nullcontext, "lm_head.weight: .* taken by no rank"),
    "an expert is skipped": ("experts", expert_skipped, r"w2_weight: 512 of 4096 elements are never written"),
    "experts are swapped": (
        "experts",
        lambda: swapped("experts", "experts.1.", "experts.2."),
        "w13_weight.*out of order",
    ),
}


def found_at_tp2(checkpoint: Checkpoint, patch, extra: dict | None = None) -> list[str]:
    from megatron_dapo.sync.vllm import sinks_pretend

    facts = checkpoint.facts | (extra or {})
    config = sinks_pretend.engine_config(checkpoint.folder, tp=2)
    with patch:
        tables = sinks_pretend.tables_without_engine(config, facts)
    return problems(tables, {name: shape for name, (shape, _) in facts.items()})


@pytest.mark.parametrize("bug", BUGS)
def test_a_broken_loader_is_found(checkpoints, bug):
    kind, patch, expected = BUGS[bug]
    extra = (
        {"lm_head.weight": ((301, 64), torch.float32)}
        if bug == "the checkpoint has a head of its own"
        else {}
    )
    found = found_at_tp2(checkpoints[kind], patch(), extra)
    assert any(re.search(expected, problem) for problem in found), found


@pytest.mark.parametrize("kind", ["tied", "untied", "experts"])
def test_nothing_is_found_where_nothing_is_wrong(checkpoints, kind):
    assert found_at_tp2(checkpoints[kind], nullcontext()) == []
