"""A frozen reference model: the log-probabilities that an objective compares the policy's with.

It has the policy's layout and no gradients. On a GPU its weights are in host memory but while it computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_dapo.config import RunConfig
from megatron_dapo.policy import model as model_file
from megatron_dapo.policy.fp8_rules import with_whole_weights
from megatron_dapo.policy.runner import frozen_model
from megatron_dapo.policy.session import Session
from megatron_dapo.types import Batch


class ReferenceModel:
    """The weights of `objective.reference`, or else those that the policy starts from.

    digest: of all its weights, whatever the layout. A checkpoint keeps it, so that a resumed run notices
    another reference.
    """

    def __init__(self, config: RunConfig, session: Session) -> None:
        """Collective. UserError for a model that the layout or the device cannot do."""
        path = config.objective.reference or config.model.path
        self._model = frozen_model(with_whole_weights(config), session, path)
        self._parameters = [p for chunk in self._model.chunks for p in chunk.parameters()]
        self.digest = self._sum_of_bits()
        self._on_host: list[torch.Tensor] = []
        if session.device.type != "cpu":
            self._on_host = [p.data.cpu().pin_memory() for p in self._parameters]
            self._leave_device()

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """As ModelRunner.logprobs; collective."""
        with self._on_device():
            return self._model.logprobs(batch)

    def _sum_of_bits(self) -> str:
        """Collective. The sum of all elements' bits as integers, each weighted by its tensor's name."""
        model, total = self._model, 0
        for shard in model_file.weight_shards(model.chunks, model.spec, model.session):
            bits = shard.tensor.detach().view(torch.int32 if shard.tensor.itemsize == 4 else torch.int16)
            for part in shard.slices:
                weight = int.from_bytes(hashlib.sha256(part.hf.encode()).digest()[:4], "big")
                total += weight * int(bits.narrow(part.dim, part.start, part.size).sum(dtype=torch.int64))
        sums: list[int] = [0] * model.session.world_size
        dist.all_gather_object(sums, total, group=model.session.control)
        return f"{sum(sums) % 2**64:016x}"

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        for parameter, copy in zip(self._parameters, self._on_host, strict=bool(self._on_host)):
            parameter.data = copy.to(self._model.session.device, non_blocking=True)
        try:
            yield
        finally:
            self._leave_device()

    def _leave_device(self) -> None:
        for parameter, copy in zip(self._parameters, self._on_host, strict=bool(self._on_host)):
            parameter.data = copy
        model_file.drop_quantised_weights(self._model.chunks)
