"""The Python API: a script without a __main__ guard trains."""

from __future__ import annotations

import pytest
from support.runs import metrics, started

pytestmark = pytest.mark.timeout(1800)

SCRIPT = """
from megatron_dapo import DAPOTrainer

# No __main__ guard: the ranks must not run this file again.
print("script starts")
rows = [{{"prompt": f"{{i}}+1=", "answer": str(i + 1)}} for i in range(20)]
trainer = DAPOTrainer(
    model_name={model!r}, clip_epsilon=0.2, dynamic_sampling=True, max_length=8,
    overrides={{
        "model.dtype": "fp32", "run.dir": {run_dir!r}, "run.max_steps": 1, "sampling.prompts_per_step": 2,
        "sampling.samples_per_prompt": 4, "layout.data_parallel": 2, "data.max_prompt_tokens": 16,
        "reward.verifier": "dapo_test_verifiers:third",
    }},
)
print("returned", trainer.train(rows, epochs=1))
"""


def test_a_plain_script_trains(place):
    run_dir = place.folder / "script_run"
    script = place.folder / "script.py"
    script.write_text(SCRIPT.format(model=str(place.model), run_dir=str(run_dir)))
    with started([str(script)], place.data, place.folder / "script.log", module="") as run:
        assert run.wait() == 0, run.text
        assert run.all_gone()
    assert run.text.count("script starts") == 1
    assert f"returned {run_dir}" in run.text
    [line] = metrics(run_dir)
    assert line["update"] == 1 and line["policy/grad_norm"] > 0
    assert (run_dir / "hf" / "config.json").exists()
