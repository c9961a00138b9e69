"""Groups to a batch: what the trainer tells the packing of layout and model."""

from __future__ import annotations

from megatron_dapo.bridge.hf import HFModel
from megatron_dapo.config import RunConfig
from megatron_dapo.trainer import make_batch
from megatron_dapo.types import Completion, Group, Prompt

SMALL = HFModel(  # a sequence of L tokens costs 16 L + 2 L^2
    architecture="LlamaForCausalLM",
    num_layers=1,
    hidden_size=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    ffn_size=1,
    vocab_size=1,
    tied=False,
    qkv_bias=False,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_factor=None,
    max_positions=100,
    eos_token_ids=(2,),
)


def group(*lengths: int) -> Group:
    """One prompt token and responses that make sequences of these lengths."""
    return Group(
        prompt=Prompt(position=0, row=0, text="?", answer="1", tokens=(5,)),
        completions=tuple(
            Completion(tokens=(6,) * (n - 1), logprobs=(-1.0,) * (n - 1), finish_reason="stop", weight_version=0) for n in lengths
        ),
        correct=(True,) + (False,) * (len(lengths) - 1),
        rewards=(1.0,) + (-1.0,) * (len(lengths) - 1),
    )


def config(**layout: int) -> RunConfig:
    """Not checked as a run's is: interleaved pipelines are planned before they can be trained."""
    return RunConfig.model_validate({"model": {"path": "m"}, "layout": layout, "batch": {"max_tokens": 20}})


def test_ranks_are_balanced_by_the_cost_of_the_model():
    batch = make_batch([group(8, 4, 4, 2, 2)], config(data_parallel=2), SMALL)
    # 256 | 96 + 96 + 40 + 40; tokens alone would give 8 + 2 | 4 + 4 + 2
    assert batch.mini_batches[0].micro_batches == (((0,),), ((1, 2, 3, 4),))
    assert batch.imbalance == 272 / 264


def test_an_interleaved_pipeline_gets_multiples_of_its_stages():
    (rank,) = (
        make_batch([group(3, 3)], config(pipeline_parallel=4, virtual_pipeline_parallel=2), SMALL).mini_batches[0].micro_batches
    )
    assert len(rank) == 4
    (rank,) = make_batch([group(3, 3)], config(pipeline_parallel=4), SMALL).mini_batches[0].micro_batches
    assert len(rank) == 1
