"""Seconds of a step, and the search over layouts."""

from __future__ import annotations

import json

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.planning import layouts, step_time
from megatron_dapo.planning.hardware import GPUS
from megatron_dapo.planning.memory import plan_memory
from megatron_dapo.rollout.simulate_model import load_profile

LLAMA_70B = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_70B |= {"num_key_value_heads": 8, "intermediate_size": 28_672, "vocab_size": 128_256}


def estimate(config, model, gpu="H100", engines=32):
    plan = plan_memory(config, model, GPUS[gpu])
    return step_time.estimate(config, model, plan, step_time.default_workload(config), engines=engines)


def test_flops_by_hand(known_model):
    work = step_time.Workload(prompt=0, response=1000, context=500, informative=1)
    layer = 2 * 5120 * (2 * 5120 + 2 * 1024) + 6 * 5120 * 27_648 + 4 * 5120 * 500
    assert step_time._flops(known_model("Qwen2.5-32B"), work) == 64 * layer + 2 * 152_064 * 5120
    model = known_model("Qwen3-30B-A3B")
    assert step_time.active_parameters(model) == pytest.approx(3.0e9, rel=0.05)  # 3.3e9 with the embedding


def test_mfu_of_a_70b_model_is_what_megatron_publishes(known_model):
    """NVIDIA's layout for Llama 3 70B on 64 H100 in bf16 (Megatron-Bridge). Megatron-LM's README has 41 % for
    2 B to 47-48 % for 462 B parameters.
    """
    model = known_model("Qwen2.5-32B", **LLAMA_70B)
    layout = dict(tensor_parallel=4, sequence_parallel="true", pipeline_parallel=4, context_parallel=2)
    layout |= dict(virtual_pipeline_parallel=5, data_parallel=2)
    words = [f"layout.{key}={value}" for key, value in layout.items()]
    config = RunConfig.load(None, ["model.path=none", "batch.max_tokens=8192", *words])
    work = step_time.Workload(prompt=0, response=8192, context=4096, informative=1)
    parts = step_time._pass(config, model, GPUS["H100"], work, count=64, full=1.0, backward=True)
    flops = 3 * 128 * 8192 * step_time._flops(model, work) / 64
    assert 0.41 <= flops / sum(parts.values()) / 989e12 <= 0.48


def test_the_flagship_takes_what_the_simulator_says(known_model, shipped):
    found = estimate(shipped("qwen32b"), known_model("Qwen2.5-32B"))
    assert found.step == pytest.approx(1160, rel=0.15)  # docs/simulator.md
    assert found.update == pytest.approx(sum(found.update_parts.values()))


@pytest.mark.parametrize(
    ("overrides", "slower"),
    [
        (["policy.recompute=full"], 1.25),
        (["policy.recompute=selective", "policy.recompute_modules=[mlp]"], 1.1),
        (["layout.pipeline_parallel=16", "layout.data_parallel=1"], 1.0),
        (["layout.sequence_parallel=false"], 0.99),
    ],
)
def test_what_makes_an_update_longer(known_model, shipped, overrides, slower):
    model = known_model("Qwen2.5-32B")
    plain, other = (estimate(shipped("qwen32b", *words), model).update for words in ([], overrides))
    assert other / plain > slower


def test_aged_runs_generate_while_they_train(known_model, shipped):
    model = known_model("Qwen2.5-32B")
    strict, aged = (
        estimate(shipped("qwen32b_async", f"sampling.max_age={a}"), model, engines=24) for a in (0, 1)
    )
    assert aged.generate == pytest.approx(strict.generate - aged.update - aged.old_logprobs)


def test_models_beside_the_policy_take_time(known_model, shipped):
    model = known_model("Qwen2.5-32B")
    plain, reference, value = (
        estimate(shipped("qwen32b", *words), model)
        for words in ([], ["objective.kl_coef=0.01"], ["objective.kind=ppo"])
    )
    assert reference.old_logprobs == pytest.approx(2 * plain.old_logprobs)
    assert reference.update == plain.update
    assert value.old_logprobs == pytest.approx(2 * plain.old_logprobs)  # kl_coef is 0
    assert value.update == pytest.approx(2 * plain.update - plain.update_parts["output layer"])


def test_newer_gpus_are_faster(known_model, shipped):
    model = known_model("Qwen2.5-32B")
    steps = [estimate(shipped("qwen32b"), model, gpu).step for gpu in ("H100", "H200", "B200")]
    assert steps == sorted(steps, reverse=True)


# --- layouts ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(known_model):
    config = RunConfig.load(
        None,
        ["model.path=none", "rollout.max_tokens=8192", "batch.updates_per_step=8", "sampling.max_age=0"],
    )
    model, work = known_model("Qwen2.5-7B"), step_time.default_workload(config)
    found, rejected = layouts.search(config, model, GPUS["H100"], 8, work)
    return config, model, work, found, rejected


def test_proposals_fit_and_are_in_order(searched):
    config, model, _, found, _ = searched
    assert len(found) > 20
    steps = [proposal.time.step for proposal in found]
    assert steps == sorted(steps)
    for proposal in found[:5]:
        again = RunConfig.load(None, ["model.path=none", "sampling.max_age=0", *layouts.overrides(proposal)])
        assert (
            again.layout == proposal.config.layout
            and again.rollout.engines * again.rollout.tensor_parallel == 8
        )
        assert plan_memory(proposal.config, model, GPUS["H100"]).margin >= layouts.MARGIN
        assert again.batch.max_tokens >= config.data.max_prompt_tokens + config.rollout.max_tokens
        assert again.policy.recompute == proposal.config.policy.recompute


def test_the_rejected_are_counted_by_reason(searched):
    *_, rejected = searched
    assert rejected["it does not divide the GPUs"].count > 0
    split = rejected["the layout does not split the model"]
    assert any("does not divide the model's 28 attention heads" in what for what, _ in split.each)
    update = rejected["an update does not fit"]
    what, lacks = update.closest
    assert lacks == min(over for _, over in update.each) > 0 and "recomputes" in what
    assert any(name.startswith("tp1 x pp1") for name, _ in update.each)  # a whole replica on every GPU


def test_the_shipped_layouts_are_among_the_planners_best(known_model, shipped):
    """qwen7b_1node.yaml is the second, within one percent of the first."""
    config, model = shipped("qwen7b_1node"), known_model("Qwen2.5-7B")
    found, _ = layouts.search(config, model, GPUS["H100"], 8, step_time.default_workload(config))
    ours = next(i for i, p in enumerate(found) if p.config.layout == config.layout)
    assert found[ours].time.step < 1.01 * found[0].time.step
    best = found[ours].config
    assert best.policy.recompute is config.policy.recompute is None
    assert best.batch.max_tokens == config.batch.max_tokens
    assert best.rollout.memory_utilization == pytest.approx(config.rollout.memory_utilization)
    assert best.rollout.tensor_parallel == config.rollout.tensor_parallel


def test_the_flagships_memory_is_the_planners_answer(known_model, shipped, monkeypatch):
    """Recomputation, micro-batch and the engines' share of memory, for its layout and its engines."""
    config, model = shipped("qwen32b"), known_model("Qwen2.5-32B")
    monkeypatch.setattr(layouts, "_layouts", lambda *_: iter([config.layout]))
    monkeypatch.setattr(layouts, "SIZES", (config.rollout.tensor_parallel,))
    found, _ = layouts.search(config, model, GPUS["H100"], 128, step_time.default_workload(config))
    best = found[0].config
    assert (best.policy.recompute, best.batch.max_tokens) == (
        config.policy.recompute,
        config.batch.max_tokens,
    )
    assert best.rollout.memory_utilization == pytest.approx(config.rollout.memory_utilization)
    assert found[0].engines == 32


def test_the_simulator_takes_the_best(searched, tmp_path, shipped):
    config, model, work, found, _ = searched
    file = tmp_path / "speed.json"
    file.write_text(json.dumps(layouts.simulator_profile(found[0], model, work)))
    profile = load_profile(config, file)  # of a model that the simulator does not know
    assert profile.colocated and profile.kv_tokens > 100_000
    assert profile.tokens_per_second[256] > profile.tokens_per_second[1]


def test_a_search_that_makes_no_sense_is_refused(known_model, shipped):
    model = known_model("Qwen2.5-32B")
    work = step_time.default_workload(shipped("qwen32b"))
    with pytest.raises(UserError, match="rollout.colocated=false"):
        layouts.search(shipped("qwen32b_async"), model, GPUS["H100"], 32, work)
    with pytest.raises(UserError, match="--gpus 12 must be a multiple of the 8 GPUs"):
        layouts.search(shipped("qwen32b"), model, GPUS["H100"], 12, work)
