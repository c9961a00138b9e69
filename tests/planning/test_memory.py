"""What lies in the GPUs' memory in each phase."""

from __future__ import annotations

import pytest
from support.models import make_tiny_model

from megatron_dapo import preflight
from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.planning.fits import memory_suffices
from megatron_dapo.planning.hardware import GIB, GPUS
from megatron_dapo.planning.layouts import MARGIN
from megatron_dapo.planning.memory import PHASES, plan_memory, staging_bytes

MODELS = {
    "qwen32b": "Qwen2.5-32B",
    "qwen32b_async": "Qwen2.5-32B",
    "qwen7b_1node": "Qwen2.5-7B",
    "recommended_small": "Qwen2.5-1.5B",
    "qwen3_30b_a3b": "Qwen3-30B-A3B",
}


@pytest.fixture
def planned(known_model, shipped):
    def plan(name: str, *overrides: str, gpu: str = "H100"):
        return plan_memory(shipped(name, *overrides), known_model(MODELS[name]), GPUS[gpu])

    return plan


@pytest.mark.parametrize("name", MODELS)
def test_every_shipped_gpu_configuration_fits(planned, name):
    plan = planned(name)
    assert plan.margin >= MARGIN or name == "qwen32b_async"  # whose engines have 0.9 of GPUs of their own
    assert plan.margin > 0 and plan.kv_tokens > 100_000


def test_engines_and_policy_take_turns(planned):
    plan = planned("qwen32b")
    parts = plan.fullest("generate").parts
    assert "KV cache" in parts["generate"] and not {"gradients", "optimizer state"} & parts["generate"].keys()
    for phase in ("old_logprobs", "update"):
        assert not {"KV cache", "engine weights"} & parts[phase].keys()
        assert {"gradients", "optimizer state", "engine, other"} <= parts[phase].keys()
    assert "engine weights" in parts["sync"] and "KV cache" not in parts["sync"]


def test_engines_that_stay_awake_are_counted_in_every_phase(planned):
    turns, awake = planned("qwen32b"), planned("qwen32b", "rollout.sleep=false")
    share = 0.8 * GPUS["H100"].speed.memory_bytes
    for phase in PHASES:
        parts = awake.fullest(phase).parts[phase]
        engine = parts["engine weights"] + parts["engine, other"] + parts["KV cache"]
        assert engine == pytest.approx(share)
        assert {"gradients", "optimizer state"} <= parts.keys()
    assert awake.margin < 0 < turns.margin
    assert all(rank.offloaded == 0 for rank in awake.ranks)
    assert max(rank.offloaded for rank in turns.ranks) == max(rank.sizes.optimizer for rank in turns.ranks)


def test_engines_on_other_hosts_are_gpus_of_their_own(planned):
    plan = planned("qwen32b_async")
    policy, engines = plan.ranks[:-1], plan.ranks[-1]
    assert all("engine weights" not in rank.parts["generate"] for rank in policy)
    assert engines.total("generate") == pytest.approx(0.9 * GPUS["H100"].speed.memory_bytes)


def test_state_on_the_host_leaves_its_gpu(planned):
    plan = planned("qwen32b", "optimizer.cpu_offload=0.25")
    rank = plan.ranks[0]
    assert rank.parts["update"]["optimizer state"] == 0.75 * rank.sizes.optimizer
    assert rank.parts["generate"]["optimizer state"] == 0.75 * rank.sizes.optimizer
    assert rank.offloaded == 0.25 * rank.sizes.optimizer


def test_the_engines_cache_by_hand(planned):
    # 4 workers: 0.8 of 79.1 GiB less 4.5 GiB and a quarter of the weights; 262,144 bytes a token
    room = 4 * (0.8 * 79.1 - 4.5) * GIB - 2 * 32_763_876_352
    assert planned("qwen32b").kv_tokens == pytest.approx(room / 262_144, rel=1e-6)
    # 8 workers of a model with 4 key/value heads keep each of them twice
    twice = planned("qwen7b_1node", "rollout.tensor_parallel=8")
    whole = 8 * (0.75 * 79.1 - 4.5) * GIB - 2 * 7_615_616_512
    assert twice.kv_tokens == pytest.approx(whole / (2 * 28 * 8 * 128 * 2), rel=1e-6)


def test_staging_by_hand(known_model, shipped):
    model, gpu = known_model("Qwen2.5-32B"), GPUS["H100"]
    assert staging_bytes(shipped("qwen32b"), model, gpu) == pytest.approx(3.3 * 2**30)
    assert staging_bytes(shipped("qwen32b", "rollout.engines=4"), model, gpu) == pytest.approx(5.3 * 2**30)
    assert staging_bytes(shipped("qwen32b_async"), model, gpu) == pytest.approx(1.3 * 2**30)
    one_host = shipped("qwen7b_1node", "sync.chunk_bytes=1000")
    assert staging_bytes(one_host, known_model("Qwen2.5-7B"), gpu) == 2000


def test_fp8_engines_hold_less(planned):
    bf16, fp8 = planned("qwen32b"), planned("qwen32b", "rollout.quantization=fp8_block")
    weights = [plan.ranks[0].parts["generate"]["engine weights"] for plan in (bf16, fp8)]
    assert weights[1] / weights[0] == pytest.approx(0.524, abs=0.001)  # of the push, test_plan_tool.py


def test_a_reference_model_visits_the_gpu(planned):
    plain, other = planned("qwen32b"), planned("qwen32b", "objective.kl_coef=0.01")
    for before, rank in zip(plain.ranks, other.ranks, strict=True):
        assert rank.parts["old_logprobs"]["reference model's weights"] == rank.sizes.weights
        assert all("reference model's weights" not in rank.parts[p] for p in ("generate", "update", "sync"))
        assert rank.offloaded == before.offloaded + rank.sizes.weights
        assert rank.total("update") == before.total("update")


def test_another_reference_model_has_its_own_size(known_model, shipped):
    model, small = known_model("Qwen2.5-32B"), known_model("Qwen2.5-7B", vocab_size=152_064)
    config = shipped("qwen32b", "objective.kl_coef=0.01", "layout.tensor_parallel=4")
    plan = plan_memory(config, model, GPUS["H100"], reference=small)
    weights = plan.ranks[0].parts["old_logprobs"]["reference model's weights"]
    layer = 3584 * (3584 + 2 * 512) + (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18_944
    assert weights == 2 * (7 * (layer / 4 + 2 * 3584) + 152_064 / 4 * 3584)


def test_a_value_model_is_trained_beside_the_policy(planned):
    plain, other = planned("qwen32b"), planned("qwen32b", "objective.kind=ppo")
    # stages in the middle have the same twice; the last one has 5,120 weights instead of an output layer
    less = {0: 0, 1: 0, 2: 0, 3: 152_064 * 5120 // 8 - 5120}
    for before, rank in zip(plain.ranks, other.ranks, strict=True):
        elements = rank.sizes.elements - less[rank.stage]
        assert rank.parts["generate"]["value model's weights"] == 2 * elements
        update, was = rank.parts["update"], before.parts["update"]
        assert update["gradients"] == was["gradients"] + 4 * elements
        assert update["optimizer state"] == pytest.approx(was["optimizer state"] + 3 * elements, abs=12)
        assert update["activations"] == was["activations"]


@pytest.mark.parametrize(
    ("gpu", "overrides", "copies"),
    [
        ("H100", ["policy.fp8.recipe=tensorwise"], 2),  # by row and by column
        ("B200", ["policy.fp8.recipe=tensorwise"], 1),  # which multiplies either
        ("H100", ["policy.fp8.recipe=blockwise"], 2 + 2 * 4 / 128**2),
        ("B200", ["policy.fp8.recipe=mxfp8"], 2 + 2 / 32),
    ],
)
def test_weights_in_fp8_by_hand(planned, gpu, overrides, copies):
    matrices = 16 * (5120 * 7168 + 5120 * 5120 + 3 * 5120 * 27_648) // 8  # of a stage, on a rank
    rank = planned("qwen32b", *overrides, gpu=gpu).ranks[1]
    for phase in PHASES:
        copied = rank.parts[phase].get("weights in FP8", 0.0)
        assert copied == pytest.approx(matrices * copies if phase in ("old_logprobs", "update") else 0.0)
        assert rank.parts[phase]["policy weights"] == rank.sizes.weights
    # nothing else is there of the weights
    rank = planned("qwen32b", *overrides, "policy.fp8.param_gather=true", gpu=gpu).ranks[1]
    for phase in PHASES:
        assert rank.parts[phase]["weights in FP8 that stay"] == pytest.approx(matrices * copies)
        assert rank.parts[phase]["policy weights"] == rank.sizes.weights - 2 * matrices
        assert "weights in FP8" not in rank.parts[phase]
    # a reference model has what it multiplies with in its forward passes
    rank = planned("qwen32b", *overrides, "objective.kl_coef=0.01", gpu=gpu).ranks[1]
    by_row = 1 if copies == 1 else copies / 2
    expected = rank.sizes.weights + matrices * by_row
    assert rank.parts["old_logprobs"]["reference model's weights"] == pytest.approx(expected)
    assert all("weights in FP8 that stay" not in rank.parts[phase] for phase in PHASES)


def test_the_first_and_the_last_layer_may_stay_in_bf16(planned):
    all_layers, fewer = (
        planned("qwen32b", "policy.fp8.recipe=blockwise", f"policy.fp8.first_last_bf16={word}").ranks
        for word in ("false", "true")
    )
    shares = [b.sizes.quantized / a.sizes.quantized for a, b in zip(all_layers, fewer, strict=True)]
    assert shares == [15 / 16, 1, 1, 15 / 16]


# --- preflight --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rollout.memory_utilization=0.98"],
            "generate is planned to take .* lower rollout.memory_utilization",
        ),
        (["batch.max_tokens=65536"], "update is planned to take .*activations .* set policy.recompute"),
        (["rollout.tensor_parallel=1"], "rollout.memory_utilization=0.8 .* leaves no KV cache .*parallel=1"),
    ],
)
def test_a_run_that_cannot_fit_is_refused(known_model, shipped, overrides, message):
    with pytest.raises(UserError, match=message):
        memory_suffices(shipped("qwen32b", *overrides), known_model("Qwen2.5-32B"), GPUS["H100"])


def test_only_the_deep_preflight_looks_at_memory(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}')
    words = [f"model.path={make_tiny_model(tmp_path / 'model')}", f"data.path={data}", "run.device=cuda"]
    words += ["data.max_prompt_tokens=16", "rollout.max_tokens=16", "rollout.memory_utilization=0.99"]
    config = RunConfig.load(None, [*words, "sampling.max_age=0", f"run.dir={tmp_path / 'run'}"])
    preflight.check(config, planned=True)
    with pytest.raises(UserError, match="generate is planned to take"):
        preflight.check(config, planned=True, deep=True)


def test_a_run_that_fits_is_not_refused(known_model, shipped):
    model = known_model("Qwen2.5-32B")
    memory_suffices(shipped("qwen32b"), model, GPUS["H100"])
    memory_suffices(shipped("qwen32b", "rollout.tensor_parallel=1"), model, GPUS["B200"])
