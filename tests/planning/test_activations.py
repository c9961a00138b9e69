"""What a rank keeps for the backward pass: by hand, and against the peak memory of Megatron's own runs."""

from __future__ import annotations

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.layout import Layout
from megatron_dapo.planning.activations import (
    GPU_LAYERS,
    Kept,
    Layers,
    in_flight,
    kept_per_token,
    rank_activations,
    recomputed_per_token,
    schedule,
)
from megatron_dapo.planning.sizes import rank_sizes

TOKENS, GIB = 22_528, 2**30


@pytest.mark.parametrize(
    ("overrides", "stage", "gib"),
    [
        # 16 layers of 2 x (4 x 640 + 896 + 768 + 640 + 3 x 3456) + 4 x 5 bytes a token
        ([], 1, 22_528 * 16 * 30_484 / GIB),
        # without 640 normalised inputs and 3 x 3456 of the MLP
        (["policy.recompute=selective", "policy.recompute_modules=[mlp]"], 1, 22_528 * 16 * 8_468 / GIB),
        (
            ["policy.recompute=selective", "policy.recompute_modules=[core_attn]"],
            1,
            22_528 * 16 * 30_464 / GIB,
        ),
        (
            ["policy.recompute=selective", "policy.recompute_modules=[layernorm]"],
            1,
            22_528 * 16 * 30_484 / GIB,
        ),
        (["policy.recompute=full"], 1, 22_528 * 16 * 1_280 / GIB),
        (["policy.recompute=full", "policy.recompute_layers=4"], 1, 22_528 * 4 * 1_280 / GIB),
        # and 5,120 hidden states of every token, 640 of the final norm's input
        ([], 3, 22_528 * (16 * 30_484 + 2 * 5_760) / GIB),
        # one byte of 640 + 640 + 3456 that linear layers multiply, and 640 beside attention's own output
        (["policy.fp8.recipe=tensorwise"], 1, 22_528 * 16 * (30_484 - 640 - 640 - 3456 + 640) / GIB),
        # of the last stage's 16 layers the last one is in bf16
        (
            ["policy.fp8.recipe=tensorwise", "policy.fp8.first_last_bf16=true"],
            3,
            22_528 * (15 * 26_388 + 30_484 + 2 * 5_760) / GIB,
        ),
        # blocks of 128 have a scale of 4 bytes
        (["policy.fp8.recipe=blockwise"], 1, 22_528 * 16 * (26_388 + (3 * 640 + 3456) / 32) / GIB),
    ],
)
def test_one_micro_batch_of_the_flagship(known_model, shipped, overrides, stage, gib):
    config, model = shipped("qwen32b", *overrides), known_model("Qwen2.5-32B")
    found = rank_activations(config, model, stage, micro_batches=1)
    assert found.kept / GIB == pytest.approx(gib, rel=1e-9)
    assert found.in_flight == 16


def test_what_is_dropped_is_made_again(known_model, shipped):
    model = known_model("Qwen3-30B-A3B")
    for modules in (["mlp"], ["moe"], ["moe_act"], ["layernorm", "moe"]):
        names = f"policy.recompute_modules=[{','.join(modules)}]"
        config = shipped("qwen3_30b_a3b", "policy.recompute=selective", names)
        rows = GPU_LAYERS.rows(model, config.layout.to_layout(), 2, None)
        whole = sum(row.per_token for row in rows)
        kept, again = (f(rows, config.policy) for f in (kept_per_token, recomputed_per_token))
        assert kept + again == pytest.approx(whole)
        assert (again > 0) == (modules != ["mlp"])  # there is no dense MLP


def test_experts_keep_what_their_tokens_bring(known_model, shipped):
    model = known_model("Qwen3-30B-A3B")
    layout = shipped("qwen3_30b_a3b").layout.to_layout()  # tp 4, ep 8
    rows = {row.name: row.per_token for row in GPU_LAYERS.rows(model, layout, 2, None)}
    busiest = 8 / 4 * 1.5  # of 8 experts a token, of a quarter of the tokens; the assumed surplus
    assert rows["expert input"] == 2 * 2048 * busiest
    assert rows["expert gate, up"] == 2 * 2 * 768 * busiest
    alone = {row.name: row.per_token for row in GPU_LAYERS.rows(model, Layout(), 2, None)}
    assert alone["expert input"] == 2 * 2048 * 8


# --- the schedule -----------------------------------------------------------------------


def test_the_order_of_1f1b():
    text = "".join("F" if forward else "B" for forward, _ in schedule(Layout(pp=4), 1, 5))
    assert text == "FFFBFBFBBB"


def test_the_order_of_an_interleaved_pipeline():
    order = [f"{'F' if f else 'B'}{c}" for f, c in schedule(Layout(pp=2, vpp=2), 0, 2)]
    # first stage of 2: 2 x 1 + 1 x 2 chunks ahead of the first backward pass
    assert order == ["F0", "F0", "F1", "F1", "B1", "B1", "B0", "B0"]
    last = [f"{'F' if f else 'B'}{c}" for f, c in schedule(Layout(pp=2, vpp=2), 1, 2)]
    assert last == ["F0", "F0", "F1", "B1", "F1", "B1", "B0", "B0"]


@pytest.mark.parametrize(
    ("layout", "micro_batches", "by_stage"),
    [
        (Layout(), 8, [1]),
        (Layout(pp=4), 8, [4, 3, 2, 1]),
        (Layout(pp=4), 2, [2, 2, 2, 1]),
        (Layout(pp=4, vpp=2), 8, [11, 9, 7, 5]),  # 2 (pp - stage - 1) + pp + 1 chunks of half a stage
    ],
)
def test_chunks_in_flight(layout, micro_batches, by_stage):
    most = [max(k for k, _ in in_flight(layout, stage, micro_batches)) for stage in range(layout.pp)]
    assert most == by_stage


def test_all_that_is_kept_is_let_go():
    for layout in (Layout(pp=4), Layout(pp=4, vpp=2), Layout()):
        order = list(schedule(layout, 0, 8))
        assert sum(1 if forward else -1 for forward, _ in order) == 0


# --- Megatron's own ---------------------------------------------------------------------


def gpt_rows(model, layout, size, fp8):
    """Megatron's GPT of its own tests: GELU, biases, dropout after attention and MLP, no rotary embedding."""
    h, q, k, t, f = model.hidden_size, model.query_size, model.key_size, layout.tp, model.ffn_size
    return (
        Kept("layer input", size * h),
        Kept("normalised inputs, MLP input", size * 3 * h),
        Kept("query, key, value; query", size * (2 * q + 2 * k) / t),
        Kept("attention output, softmax statistics", size * q / t + 4 * model.num_heads / t),
        Kept("dropout masks", 2 * h),
        Kept("MLP, before and after GELU", size * 2 * f / t),
    )


@pytest.mark.parametrize(
    ("overrides", "tokens", "stage", "allocated", "peak"),
    [
        # NVIDIA/Megatron-LM, tests/functional_tests/test_cases/gpt, golden_values_dev_dgx_h100.json:
        # gpt3_7b_tp4_pp1_memory_speed at 09eb91e, gpt3_7b_tp1_pp4_memory_speed at 070712a
        (["layout.tensor_parallel=4"], 16_384, 0, 20_663_519_232, 57_143_791_616),
        (
            ["layout.pipeline_parallel=4", "layout.virtual_pipeline_parallel=8"],
            8_192,
            3,
            24_540_168_192,
            60_518_293_504,
        ),
    ],
)
def test_peak_memory_of_megatrons_own_7b_runs(known_model, overrides, tokens, stage, allocated, peak):
    """State and activations within 6 %, and the logits that Megatron's own loss keeps in bf16 and in fp32."""
    changes = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
    changes |= {"num_key_value_heads": 8, "intermediate_size": 16_384, "vocab_size": 131_072}
    model = known_model("Qwen2.5-7B", **changes)
    config = RunConfig.load(None, ["model.path=none", f"batch.max_tokens={tokens}", *overrides])
    layout = config.layout.to_layout()
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 2 * 4096 * 16_384
    vocabulary = 131_072 * 4096 / layout.tp
    state = 12 * (layer * 32 / (layout.tp * layout.pp) + vocabulary * (2 if layout.pp == 1 else 1))
    assert state == pytest.approx(allocated, rel=0.06)  # bf16, fp32 gradients, half of 12 bytes of AdamW
    layers = Layers(rows=gpt_rows, final_norm=lambda size: size)
    kept = rank_activations(config, model, stage, micro_batches=4, layers=layers).kept
    logits = tokens * 131_072 / layout.tp * (2 + 4)
    assert allocated + kept + logits == pytest.approx(peak, rel=0.06)


@pytest.mark.parametrize(
    ("pp", "vpp", "dp", "peak"),
    # NVIDIA-NeMo/Megatron-Bridge at 067f987, skills/nemo-mbridge-perf-memory-tuning/SKILL.md: measured
    [(4, 5, 2, 58.8), (8, 5, 1, 53.2), (4, 10, 2, 60.2)],
)
def test_peak_memory_of_nvidias_70b_runs(known_model, pp, vpp, dp, peak):
    """Llama 3 70B on 32 H100 at tp4, 32 sequences of 4,096 tokens: weights of the layers in FP8 (one byte:
    parameter_transpose_cache is off), gradients in bf16, [core_attn] recomputed. Taken to be of the last
    stage, whose rank alone wrote the memory to the logs then (Megatron-Bridge issue 3167); the logits are
    those of Megatron's own loss.
    """
    changes = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
    changes |= {"num_key_value_heads": 8, "intermediate_size": 28_672, "vocab_size": 128_256}
    model = known_model("Qwen2.5-32B", **changes)
    words = ["layout.tensor_parallel=4", "layout.sequence_parallel=true", "batch.max_tokens=4096"]
    words += [f"layout.pipeline_parallel={pp}", f"layout.virtual_pipeline_parallel={vpp}"]
    words += [
        f"layout.data_parallel={dp}",
        "policy.recompute=selective",
        "policy.recompute_modules=[core_attn]",
    ]
    config = RunConfig.load(None, ["model.path=none", *words, "policy.fp8.recipe=tensorwise"])
    size = rank_sizes(config, model, pp - 1)
    state = size.weights - size.quantized + 2 * size.elements + size.optimizer
    kept = rank_activations(config, model, pp - 1, micro_batches=32 // dp).kept
    logits = 4096 * 128_256 / 4 * (2 + 4)
    assert (state + kept + logits) / 1e9 == pytest.approx(peak, rel=0.03)
