"""The table of TransformerEngine's layers against what autograd keeps of the GPU's branch of the policy, with
the stand-in of TransformerEngine on meta tensors, at the flagship's size.
"""

from __future__ import annotations

import pytest
from support.jobs_planning import config_of, small_model
from support.ranks import run_ranks
from support.standin import environment

from megatron_dapo.planning.activations import one_micro_batch

pytestmark = pytest.mark.slow

FLAGSHIP = dict(num_layers=64, hidden_size=5120, num_heads=40, num_kv_heads=8, head_dim=128)
FLAGSHIP |= dict(ffn_size=27_648, vocab_size=152_064)
LAYOUT = ["tensor_parallel=8", "sequence_parallel=true", "pipeline_parallel=4", "data_parallel=4"]
WORDS = ["batch.max_tokens=22528", *(f"layout.{word}" for word in LAYOUT)]
CASES = {
    "nothing": (FLAGSHIP, WORDS),
    "mlp": (FLAGSHIP, [*WORDS, "policy.recompute=selective", "policy.recompute_modules=[mlp]"]),
    "full": (FLAGSHIP, [*WORDS, "policy.recompute=full"]),
}


@pytest.fixture(scope="module")
def kept():
    cases = [{"changes": changes, "overrides": words} for changes, words in CASES.values()]
    with environment():
        [found] = run_ranks("support.jobs_planning:passes_of_te", 1, timeout_s=600, cases=cases)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_table_is_what_autograd_keeps(kept, name):
    changes, words = CASES[name]
    config, model = config_of(words), small_model(**changes)
    for stage, found in kept[name].items():
        planned = one_micro_batch(config, model, int(stage))
        assert found["without_gradient"] == 0
        # 11 MiB of rotary frequencies, which all layers share, are not in the table
        assert planned == pytest.approx(found["autograd"], rel=0.03 if name == "full" else 0.005)


def test_the_flagship_in_gib(kept):
    first = {name: kept[name]["0"]["autograd"] / 2**30 for name in ("nothing", "mlp", "full")}
    assert first == pytest.approx({"nothing": 10.2, "mlp": 2.85, "full": 0.44}, abs=0.05)
