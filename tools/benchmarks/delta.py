"""`bench.py delta`: what a delta of the weights takes after real updates (see tools/bench.py)."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.one_rank import one_rank_policy
from megatron_dapo.batching.packing import pack
from megatron_dapo.objectives.base import trained_tokens
from megatron_dapo.sync.delta import DeltaSender, restore
from megatron_dapo.types import Batch, Sample

SAMPLE_TOKENS = 128


def run(options: argparse.Namespace) -> dict[str, Any]:
    policy = one_rank_policy(options.model, SAMPLE_TOKENS * 4, options.overrides)
    batches = updates(tokens_of(options.model, options.texts), options.tokens)
    for _ in range(options.warmup):
        policy.update(next(batches), 0)
    ends = Ends(options.message_bytes)
    ends.push(bits(policy))
    measured = []
    for _ in range(options.updates):
        policy.update(next(batches), 0)
        measured.append(ends.push(bits(policy)))
    median = {key: statistics.median(push[key] for push in measured) for key in measured[0]}
    return {
        "lr": policy.config.optimizer.lr,
        "elements": bits(policy).numel() // 2,
        "changed": [round(push["changed"], 5) for push in measured],
        "bytes_over_full": [round(push["bytes_over_full"], 5) for push in measured],
        "sender_seconds_per_gb": round(median["sender"], 3),
        "receiver_seconds_per_gb": round(median["receiver"], 3),
        "memcpy_seconds_per_gb": round(median["memcpy"], 3),
        "break_even_gb_per_second": round((1 - median["bytes_over_full"]) / median["both"], 3),
    }


class Ends:
    """Both ends of the pushes of one rank to one carrier."""

    def __init__(self, message_bytes: int) -> None:
        self._message_bytes = message_bytes
        self._sender = DeltaSender()
        self._images: list[torch.Tensor] = []

    def push(self, weights: torch.Tensor) -> dict[str, float]:
        """Shares, and seconds per GB of the weights. The first push sends everything."""
        parcels = weights.split(self._message_bytes)
        self._images = self._images or [torch.empty_like(parcel) for parcel in parcels]
        changed = sum(
            int((old.view(torch.int16) != new.view(torch.int16)).sum())
            for old, new in zip(self._images, parcels, strict=True)
        )
        sender = receiver = memcpy = 0.0
        sent = 0
        for number, (image, parcel) in enumerate(zip(self._images, parcels, strict=True)):
            began = time.thread_time()
            outgoing = self._sender.take(number, parcel)
            sender += time.thread_time() - began
            body = self._sender.body(0, number, outgoing)
            sent += body.nbytes
            if body.nbytes == image.nbytes:
                image.copy_(body)  # which the network does
            began = time.thread_time()
            restore(body, image, outgoing.fingerprint)
            receiver += time.thread_time() - began
            target = torch.empty_like(parcel)
            target.copy_(parcel)
            began = time.thread_time()
            target.copy_(parcel)
            memcpy += time.thread_time() - began
        gigabytes = weights.nbytes / 1e9
        return {
            "changed": 2 * changed / weights.nbytes,
            "bytes_over_full": sent / weights.nbytes,
            "sender": sender / gigabytes,
            "receiver": receiver / gigabytes,
            "both": (sender + receiver) / gigabytes,
            "memcpy": memcpy / gigabytes,
        }


def bits(policy: Any) -> torch.Tensor:
    """All parameters end to end in bf16, as bytes."""
    with torch.no_grad():
        parts = [shard.tensor.reshape(-1).to(torch.bfloat16) for shard in policy.held_shards()]
        return torch.cat(parts).view(torch.uint8)


def updates(tokens: torch.Tensor, size: int) -> Iterator[Batch]:
    """Batches of one update each: `size` tokens that follow each other in the texts, in samples of which the
    first quarter is the prompt, each with an advantage from a normal distribution.
    """
    chance = random.Random(0)
    for begin in range(0, len(tokens) - size, size):
        samples = [
            Sample(
                tokens=part,
                response_mask=torch.arange(len(part)) >= max(1, len(part) // 4),
                rollout_logprobs=torch.zeros(len(part)),
                advantages=torch.full((len(part),), chance.gauss(0.0, 1.0)),
                prompt_position=0,
                number=0,
                weight_version=0,
            )
            for part in tokens[begin : begin + size].split(SAMPLE_TOKENS)
        ]
        yield pack(
            samples,
            dp=1,
            num_updates=1,
            max_tokens=SAMPLE_TOKENS * 4,
            version=0,
            denominator=trained_tokens,
        )
    raise SystemExit(
        f"error: the texts have {len(tokens)} tokens, too few for these updates of {size} tokens"
    )


def tokens_of(model: Path, texts: Path) -> torch.Tensor:
    """Tokens of the prompts of a JSONL file, one after the other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with texts.open() as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    rows = tokenizer(prompts)["input_ids"]
    return torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int32)
