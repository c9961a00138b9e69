"""What ranks do in tests/gpu: a bf16 policy against transformers, then one update and what it did; what is
left of a policy's state that goes to the host, into a checkpoint, and back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dapo.types import Batch, Sample, Stream
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


@contextlib.contextmanager
def open_gpu_policy(model: str, on_cpu: bool, overrides: Sequence[str]) -> Iterator[tuple[Any, Batch]]:
    """A bf16 policy and its rank's part of a batch, one update of several micro-batches."""
    from megatron_dapo.batching.packing import pack
    from megatron_dapo.config import RunConfig
    from megatron_dapo.objectives import make_objective
    from megatron_dapo.policy import session as session_file
    from megatron_dapo.policy.backend import backend_of
    from megatron_dapo.policy.step import Policy

    values = [f"model.path={model}", "model.dtype=bf16", "optimizer.lr=1e-3", "optimizer.weight_decay=0.0"]
    values += ["rollout.max_tokens=128", "data.max_prompt_tokens=128", "batch.max_tokens=256", *overrides]
    config = RunConfig.load(None, values)
    if not on_cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    layout = config.layout.to_layout()
    session = session_file.start(layout, backend_of(on_cpu))
    objective = make_objective(config.objective)
    policy = Policy(config, session, objective)
    samples = make_prompted_samples(policy.spec.vocab_size)
    batch = pack(
        samples, dp=layout.dp, num_updates=1, max_tokens=256, version=0, denominator=objective.denominator
    )
    yield policy, batch.part(session.dp_rank)
    session_file.stop()


def measure(model: str, on_cpu: bool, overrides: Sequence[str] = ()) -> dict[str, float]:
    """One data-parallel rank: log-probabilities against the reference, then one update and what it did."""
    with open_gpu_policy(model, on_cpu, overrides) as (policy, batch):
        mask_T = batch.response_mask_T
        reference_T = reference_logprobs(model, make_prompted_samples(policy.spec.vocab_size))
        before_T = policy.logprobs(batch)
        gap_T = (before_T - reference_T).abs()[mask_T]
        result = policy.update(batch.with_stream(Stream.OLD_LOGPROBS, before_T), 0)
        after_T = policy.logprobs(batch)
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


def keep_state(model: str, on_cpu: bool, folder: str) -> dict[str, Any]:
    """Digests of a policy's weights and optimizer state after an update, when the state has been to the host
    and back, and when a checkpoint that was written in the background, from the host's copies too, has been
    loaded after further updates; GiB of the device while it trains, while it is away, and afterwards; and
    those of fp32 gradients.
    """
    from megatron_dapo import checkpoint
    from megatron_dapo.checkpoint_writer import CheckpointWriter
    from megatron_dapo.policy.offload import memory_now, to_device, to_host

    with open_gpu_policy(model, on_cpu, []) as (policy, batch):
        batch = batch.with_stream(Stream.OLD_LOGPROBS, policy.logprobs(batch))
        gradients = 4 * sum(p.numel() for chunk in policy.chunks for p in chunk.parameters()) / 2**30
        device, writer = policy.session.device, CheckpointWriter(policy.session, in_background=True)

        def save(step: int) -> Path:
            state = checkpoint.RunState(step=step, rollouts={})
            return checkpoint.save(Path(folder), policy, state, keep=9, writer=writer)

        policy.update(batch, 0)
        digests, gib = {"trained": state_digest(policy)}, {"training": memory_now(device).reserved}
        beside = save(1)  # is written while updates go on
        policy.update(batch, 0)
        digests["later"] = state_digest(policy)
        to_host(policy)
        gib["away"] = memory_now(device).reserved
        away = save(2)
        writer.finish()
        to_device(policy)
        digests["returned"], gib["returned"] = state_digest(policy), memory_now(device).reserved
        policy.update(batch, 0)
        digests["much later"] = state_digest(policy)
        for name, path in (("loaded beside", beside), ("loaded away", away)):
            checkpoint.load(path, policy)
            digests[name] = state_digest(policy)
        return {"digests": digests, "gib": gib, "gradients": gradients}


def state_digest(policy: Any) -> str:
    """Of this rank's weights, and of its fp32 weights and AdamW's moments as a checkpoint has them."""
    from megatron_dapo.policy.optimizer_state import sharded_optimizer

    model_state = [chunk.module.sharded_state_dict() for chunk in policy.chunks]
    tensors = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    tensors += [block.data for block in sharded_optimizer(policy.optimizer, model_state).values()]
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
