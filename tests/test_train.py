"""What `train.check` refuses before any process starts: what a configuration asks of this model or this machine."""

from __future__ import annotations

import json
import re

import pytest
from tiny import make_tiny_model

from megatron_dapo.config import RunConfig
from megatron_dapo.train import check


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "data.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    model = make_tiny_model(folder / "model", layers=4)
    sizes = ["data.max_prompt_tokens=100", "rollout.max_tokens=100", "batch.max_tokens=200"]
    return [f"model.path={model}", f"data.path={folder / 'data.jsonl'}", "model.dtype=fp32", "run.device=cpu", *sizes]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["policy.recompute=full", "policy.recompute_layers=3"],
            "policy.recompute_layers=3 does not divide the 4 layers of a pipeline stage's chunk; use one of [1, 2, 4]",
        ),
        (
            [
                "policy.recompute=full",
                "policy.recompute_layers=2",
                "layout.pipeline_parallel=2",
                "layout.virtual_pipeline_parallel=2",
            ],
            "policy.recompute_layers=2 does not divide the 1 layers",
        ),
        (["layout.tensor_parallel=2", "layout.sequence_parallel=true", "policy.overlap_tensor_parallel=true"], "needs a GPU"),
        (["optimizer.cpu_offload=0.5"], "optimizer.cpu_offload=0.5 needs a GPU and run.device=cpu has none; drop it"),
        (["policy.recompute_modules=[moe_act]"], "policy.recompute_modules=['moe_act'] needs a GPU"),
        (["layout.pipeline_parallel=3"], "pipeline_parallel=3 (x virtual 1) does not divide the model's 4 layers"),
    ],
)
def test_a_run_this_model_or_machine_cannot_do_is_refused(run, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(RunConfig.load(None, [*run, *overrides]))


def test_experts_split_both_ways_need_a_gpu(run, tmp_path):
    model = make_tiny_model(tmp_path / "model", arch="qwen3_moe")
    layout = ["layout.data_parallel=4", "layout.expert_parallel=2"]
    check(RunConfig.load(None, [*run, f"model.path={model}", *layout]))
    with pytest.raises(ValueError, match="expert_tensor_parallel=2 with layout.expert_parallel=2 needs a GPU"):
        check(RunConfig.load(None, [*run, f"model.path={model}", *layout, "layout.expert_tensor_parallel=2"]))


def test_a_run_they_can_do_is_not(run):
    check(RunConfig.load(None, [*run, "policy.recompute=full", "policy.recompute_layers=2", "layout.pipeline_parallel=2"]))
