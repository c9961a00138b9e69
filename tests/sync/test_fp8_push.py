"""Pushes of a bf16 policy into engines in block FP8: these hold in every bit, and compute, what they make of
the checkpoint that vLLM's own function has quantised. Their kernels are vLLM's for a CPU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.fp8_checkpoints import EXPERTS, NO_KERNELS, SIZES, write_quantised
from support.jobs_fp8_push import Case
from support.ranks import run_ranks
from support.sink_models import make_checkpoint

pytestmark = [pytest.mark.skipif(bool(NO_KERNELS), reason=NO_KERNELS), pytest.mark.timeout(1200)]
CACHE_SCALES = r"model\.layers\.\d+\.self_attn\.attn\.(q|k|v|prob)_scale"  # come with no push


def make_case(folder: Path, arch: str, *, tied: bool) -> Case:
    sizes = SIZES | (EXPERTS if arch == "qwen3_moe" else {})
    source = make_checkpoint(folder / "policy", arch, tied=tied, **sizes)
    (source.folder / "tokenizer.json").write_text("{}")  # is not read
    opposite = {name: -tensor for name, tensor in source.tensors.items()}
    return Case(
        begin=str(write_quantised(folder / "begin", source.folder, opposite)),
        policy=str(source.folder),
        quantised=str(write_quantised(folder / "quantised", source.folder, source.tensors)),
    )


def push(folder: Path, architectures: Sequence[str], trainer: int, engines: Sequence[int]) -> None:
    cases = {arch: make_case(folder / arch, arch, tied=arch == "qwen2") for arch in architectures}
    arguments = {"cases": cases, "engine_sizes": engines, "folder": str(folder)}
    [found, *_] = run_ranks("support.jobs_fp8_push:push", trainer, timeout_s=1000, **arguments)
    assert list(found) == list(architectures)
    for arch, by_engine in found.items():
        assert list(by_engine) == [f"tp{tp}" for tp in engines]
        for result in by_engine.values():
            assert result["sent_bytes"] == result["shard_bytes"]
            for held, fresh, computed in result["workers"]:
                assert sum(name.endswith("_scale_inv") for name in held) >= 8
                assert {name for name in held if held[name] != fresh.get(name)} == set(), arch
                assert all(re.fullmatch(CACHE_SCALES, name) for name in fresh.keys() - held.keys())
                assert computed == [], arch


def test_engines_hold_what_vllm_quantises(tmp_path):
    """A part of the next test, for every day."""
    push(tmp_path, ["qwen2", "qwen3_moe"], 2, [2])


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "engines"), [(1, [2]), (2, [1, 2])])
def test_all_families_hold_what_vllm_quantises(tmp_path, trainer, engines):
    push(tmp_path, ["qwen2", "qwen3", "llama", "mistral", "qwen3_moe"], trainer, engines)
