"""The policy on a GPU: bf16, TransformerEngine, packed attention, NCCL. `TEST_PYTHON=python bash tests/run.sh -m gpu`, where there is one.

The same measurement on the CPU backend runs with every test run, so that what is compared here is known to be comparable.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from ranks import run_ranks

GAP_MEAN, GAP_MAX = 0.04, 0.3  # nats, between bf16 and the fp32 reference; the CPU backend shows 0.015 and 0.064
NUM_SAMPLES = 8


def make_samples(vocab_size: int) -> list[Any]:
    """Random prompts and responses of different lengths, half with advantage +1, half with -1."""
    from megatron_dapo.types import Sample

    dice = random.Random(0)
    samples = []
    for number in range(NUM_SAMPLES):
        prompt, response = dice.randint(2, 40), dice.randint(1, 60)
        mask = (False,) * prompt + (True,) * response
        samples.append(
            Sample(
                tokens=tuple(dice.randrange(3, vocab_size) for _ in mask),
                response_mask=mask,
                rollout_logprobs=(0.0,) * len(mask),
                advantage=1.0 if number % 2 else -1.0,
                weight_version=0,
                prompt_position=number,
            )
        )
    return samples


def reference_logprobs(model: str, samples: list[Any]) -> torch.Tensor:
    """Log-probability of every token of all samples end to end [T], by transformers in fp32; 0 where nothing is trained."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    parts = []
    for sample in samples:
        tokens = torch.tensor(sample.tokens)
        with torch.no_grad():
            logprobs = loaded(tokens[None]).logits[0, :-1].log_softmax(-1)
        taken = torch.cat([torch.zeros(1), logprobs.gather(1, tokens[1:, None])[:, 0]])
        parts.append(torch.where(torch.tensor(sample.response_mask), taken, 0.0))
    return torch.cat(parts)


def measure(model: str, on_cpu: bool) -> dict[str, float]:
    """One rank: log-probabilities against the reference, then one update and what it did."""
    from megatron_dapo.algo.packing import pack
    from megatron_dapo.config import RunConfig
    from megatron_dapo.policy import parallel
    from megatron_dapo.policy.step import Policy

    config = RunConfig.make(
        {
            "model": {"path": model, "dtype": "bf16"},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
            "rollout": {"max_tokens": 128},
            "data": {"max_prompt_tokens": 128},
            "batch": {"max_tokens": 256},
        }
    )
    if not on_cpu:
        torch.cuda.set_device(0)
    policy = Policy(config, on_cpu=on_cpu)
    samples = make_samples(policy.hf.vocab_size)
    batch = pack(samples, dp=1, num_updates=1, max_tokens=256)
    mask_T = batch.response_mask_T
    before_T = policy.logprobs(batch)
    gap_T = (before_T - reference_logprobs(model, samples)).abs()[mask_T]
    result = policy.update(batch, 0, before_T)
    after_T = policy.logprobs(batch)
    advantages_T = torch.repeat_interleave(batch.advantages_N, torch.tensor(batch.lengths))
    parallel.stop()
    return {
        "num_tokens": int(mask_T.sum()),
        "num_micro_batches": result.num_micro_batches,
        "gap_mean": float(gap_T.mean()),
        "gap_max": float(gap_T.max()),
        "loss": result.loss,
        "expected_loss": -float((advantages_T * mask_T).sum() / mask_T.sum()),
        "grad_norm": result.grad_norm,
        "gain": float(((after_T - before_T) * advantages_T)[mask_T].mean()),
    }


def check(found: dict[str, float]) -> None:
    assert found["num_tokens"] > 100 and found["num_micro_batches"] > 1  # several packed sequences, several micro-batches
    assert found["gap_mean"] < GAP_MEAN and found["gap_max"] < GAP_MAX, found
    assert found["loss"] == pytest.approx(found["expected_loss"], abs=1e-2)  # ratio 1: minus the mean advantage
    assert math.isfinite(found["grad_norm"]) and found["grad_norm"] > 0
    assert found["gain"] > 0.01  # the update raised what had a positive advantage


@pytest.mark.gpu
def test_bf16_transformer_engine_policy(tiny_model):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    pytest.importorskip("transformer_engine.pytorch", exc_type=ImportError)
    (found,) = run_ranks("gpu.test_gpu_policy:measure", 1, model=str(tiny_model), on_cpu=False)
    check(found)


def test_the_measurement_itself_on_the_cpu_backend(tiny_model):
    (found,) = run_ranks("gpu.test_gpu_policy:measure", 1, model=str(tiny_model), on_cpu=True)
    check(found)


def test_a_wrong_model_would_be_seen(tiny_model, tmp_path):
    """The allowed gap is far below the one between two models."""
    from tiny import make_tiny_model

    samples = make_samples(90)
    other = make_tiny_model(tmp_path, tied=True, seed=1)
    gap_T = (reference_logprobs(str(tiny_model), samples) - reference_logprobs(str(other), samples)).abs()
    assert float(gap_T[gap_T > 0].mean()) > 10 * GAP_MEAN
