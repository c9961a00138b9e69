"""What a rank does in tests/gpu: a bf16 policy against transformers, then one update and what it did."""

from __future__ import annotations

import random

import torch

from megatron_dapo.types import Sample, Stream
from support.samples import make_sample

NUM_SAMPLES = 8


def make_prompted_samples(vocab_size: int) -> list[Sample]:
    """Random prompts and responses of different lengths, half with advantage +1, half with -1."""
    dice = random.Random(0)
    samples = []
    for number in range(NUM_SAMPLES):
        prompt, response = dice.randint(2, 40), dice.randint(1, 60)
        tokens = [dice.randrange(3, vocab_size) for _ in range(prompt + response)]
        samples.append(
            make_sample(
                tokens,
                prompt,
                rollout_logprobs=[0.0] * len(tokens),
                advantage=1.0 if number % 2 else -1.0,
                prompt_position=number,
            )
        )
    return samples


def reference_logprobs(model: str, samples: list[Sample]) -> torch.Tensor:
    """Log-probability of every token of all samples end to end [T], by transformers in fp32; 0 where nothing
    is trained.
    """
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    parts = []
    for sample in samples:
        tokens = sample.tokens.long()
        with torch.no_grad():
            logprobs = loaded(tokens[None]).logits[0, :-1].log_softmax(-1)
        taken = torch.cat([torch.zeros(1), logprobs.gather(1, tokens[1:, None])[:, 0]])
        parts.append(torch.where(sample.response_mask, taken, 0.0))
    return torch.cat(parts)


def measure(model: str, on_cpu: bool) -> dict[str, float]:
    """One rank: log-probabilities against the reference, then one update and what it did."""
    from megatron_dapo.batching.packing import pack
    from megatron_dapo.config import RunConfig
    from megatron_dapo.objectives import make_objective
    from megatron_dapo.policy import session as session_file
    from megatron_dapo.policy.backend import backend_of
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
    session = session_file.start(config.layout.to_layout(), backend_of(on_cpu))
    objective = make_objective(config.objective)
    policy = Policy(config, session, objective)
    samples = make_prompted_samples(policy.spec.vocab_size)
    batch = pack(
        samples, dp=1, num_updates=1, max_tokens=256, version=0, denominator=objective.denominator
    ).part(0)
    mask_T = batch.response_mask_T
    before_T = policy.logprobs(batch)
    gap_T = (before_T - reference_logprobs(model, samples)).abs()[mask_T]
    result = policy.update(batch.with_stream(Stream.OLD_LOGPROBS, before_T), 0)
    after_T = policy.logprobs(batch)
    session_file.stop()
    return {
        "num_tokens": int(mask_T.sum()),
        "num_micro_batches": result.num_micro_batches,
        "gap_mean": float(gap_T.mean()),
        "gap_max": float(gap_T.max()),
        "loss": result.loss,
        "expected_loss": -float((batch.advantages_T * mask_T).sum() / mask_T.sum()),
        "grad_norm": result.grad_norm,
        "gain": float(((after_T - before_T) * batch.advantages_T)[mask_T].mean()),
    }
