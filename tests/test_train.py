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
        (
            ["policy.recompute_modules=[mlp,moe]"],
            "policy.recompute_modules=['mlp', 'moe']: moe and moe_act need a model with experts",
        ),
        (["policy.recompute_modules=[moe_act]"], "policy.recompute_modules=['moe_act'] needs a GPU"),
        (["layout.pipeline_parallel=3"], "pipeline_parallel=3 (x virtual 1) does not divide the model's 4 layers"),
    ],
)
def test_a_run_this_model_or_machine_cannot_do_is_refused(run, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(RunConfig.load(None, [*run, *overrides]))


def test_a_run_they_can_do_is_not(run):
    check(RunConfig.load(None, [*run, "policy.recompute=full", "policy.recompute_layers=2", "layout.pipeline_parallel=2"]))
