"""Keys of distributed checkpoints and the parameters behind them, by hand."""

from __future__ import annotations

import pytest
from support.weights import small_model

from megatron_dapo.convert.disk_keys import extra_states, parse, targets

L = "decoder.layers."


@pytest.mark.parametrize(
    ("key", "index", "name", "half"),
    [
        ("embedding.word_embeddings.weight", (), "embedding.word_embeddings.weight", None),
        ("module.module.output_layer.weight", (), "output_layer.weight", None),
        (L + "self_attention.linear_qkv.weight", (3,), L + "3.self_attention.linear_qkv.weight", None),
        (L + "17.self_attention.linear_qkv.bias", (), L + "17.self_attention.linear_qkv.bias", None),
        (L + "mlp.experts.experts.linear_fc1.weight", (3, 5), L + "3.mlp.experts.linear_fc1.weight5", None),
        (L + "3.mlp.experts.experts.linear_fc2.weight", (5,), L + "3.mlp.experts.linear_fc2.weight5", None),
        (L + "3.mlp.experts.experts.5.linear_fc1.weight_w", (), L + "3.mlp.experts.linear_fc1.weight5", 0),
        (L + "3.mlp.experts.experts.5.linear_fc1.weight_v", (), L + "3.mlp.experts.linear_fc1.weight5", 1),
        (L + "3.mlp.linear_fc1.weight_v", (), L + "3.mlp.linear_fc1.weight", 1),
        (L + "mlp.linear_fc1.weight", (0,), L + "0.mlp.linear_fc1.weight", None),
    ],
)
def test_keys(key, index, name, half):
    found = parse(key)
    assert found is not None
    assert (found.parameter(index), found.axes, found.half) == (name, len(index), half)


@pytest.mark.parametrize(
    "key",
    [
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight",
        "chained_0.optimizer.state.fp32_param.output_layer.weight",
        "value_model.decoder.layers.mlp.linear_fc2.weight",
        "rng_state",
        "decoder.layers.mlp.linear_fc1._extra_state",
    ],
)
def test_what_is_no_parameter(key):
    assert parse(key) is None


def test_targets_of_a_dense_model():
    found = list(targets(small_model(tied=True)))  # 2 layers with biases
    assert [t.name for t in found if not t.index] == [
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
    ]
    assert len(found) == 2 + 2 * 7
    [fc1] = [t for t in found if t.name == L + "1.mlp.linear_fc1.weight"]
    assert (fc1.keys, fc1.index, fc1.stack) == ((L + "mlp.linear_fc1.weight",), (1,), (2,))
    for target in found:
        assert all(parse(key).parameter(target.index) == target.name for key in target.keys)


def test_targets_of_a_model_with_experts():
    found = {t.name: t for t in targets(small_model(num_experts=3, qk_norm=True, qkv_bias=False))}
    expert = found[L + "1.mlp.experts.linear_fc2.weight2"]
    assert expert.keys == (L + "mlp.experts.experts.linear_fc2.weight",)
    assert (expert.index, expert.stack) == ((1, 2), (2, 3))
    norm = found[L + "0.mlp.linear_fc1.layer_norm_weight"]  # the two layer specs differ
    assert norm.keys == (L + "pre_mlp_layernorm.weight", L + "mlp.linear_fc1.layer_norm_weight")
    assert found[L + "0.self_attention.linear_qkv.layer_norm_weight"].keys == (
        L + "self_attention.linear_qkv.layer_norm_weight",
    )


def test_extra_states():
    dense = list(extra_states(small_model()))
    assert len(set(dense)) == len(dense)
    assert L + "mlp.linear_fc2._extra_state/shard_1_2" in dense
    experts = list(extra_states(small_model(num_experts=3)))
    assert L + "mlp.experts.experts.linear_fc1._extra_state/shard_1.2_2.3" in experts
    assert not any("mlp.linear_fc" in key for key in experts)
