"""A model on this rank and what it takes to run packed batches through it, without an optimizer: the
log-probabilities of a batch, and Megatron's pipeline schedule over its micro-batches for whoever trains the
model.

Several may live in one process (a policy, a frozen reference from another checkpoint): each has its own
weights and its own Megatron configuration, all share the Session. Methods that run the model are collective:
every rank calls them with the part of the batch that its data-parallel rank trains on (Batch.part).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule

from megatron_dapo.config import RunConfig
from megatron_dapo.model_spec import ModelSpec, read_model
from megatron_dapo.policy import model as model_file
from megatron_dapo.policy import rules
from megatron_dapo.policy.forward import MicroBatch, make_micro_batch, response_logprobs, run_model
from megatron_dapo.policy.fp8_rules import token_multiple
from megatron_dapo.policy.session import Session
from megatron_dapo.types import Batch, MiniBatch
from megatron_dapo.weights.hf import resolve_folder

# (what the last stage returns, micro-batch, its number) -> Megatron's three: what to take the gradient of, an
# int tensor to add to the divisor of the gradient, and anything to report. Only called on that stage.
LossFunction = Callable[[torch.Tensor, MicroBatch, int], tuple[torch.Tensor, torch.Tensor, Any]]


class ModelRunner:
    """`chunks` are this rank's parts of the model `spec` (one, or several in an interleaved pipeline), with
    the weights of `folder`. Layout, precision, recomputation and sampling temperature are those of the run's
    configuration.
    """

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        folder: Path,
        spec: ModelSpec,
        chunks: Sequence[MegatronModule],
    ) -> None:
        self.config, self.session, self.folder, self.spec, self.chunks = config, session, folder, spec, chunks

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probability of every trained token under the present weights: [T] over the part, 0 elsewhere.

        The same tensor on every rank of the replica.
        """
        return self.of_tokens(batch, lambda hidden, micro: self.response_logprobs(hidden, micro)[0])

    def of_tokens(
        self, batch: Batch, measure: Callable[[torch.Tensor, MicroBatch], torch.Tensor]
    ) -> torch.Tensor:
        """What `measure` makes [R] of the last stage's outputs for each trained token: [T], as `logprobs`."""
        flat_T = torch.zeros(batch.tokens_T.numel())

        def collect(outputs: torch.Tensor, micro: MicroBatch, number: int) -> tuple[Any, Any, dict]:
            measured_R = measure(outputs, micro)
            if self.session.tp_rank == 0:
                flat_T[micro.flat_R] = measured_R.cpu()
            return measured_R.sum(), torch.zeros((), dtype=torch.int, device=self.session.device), {}

        with torch.no_grad():
            for k in range(len(batch.mini_batches)):
                self.run_schedule(batch, k, collect, forward_only=True)
        dist.all_reduce(flat_T, group=self.session.replica_group)
        return flat_T

    def response_logprobs(
        self, hidden: torch.Tensor, micro: MicroBatch, *, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy [R] of the trained tokens, from the last stage's hidden states."""
        return response_logprobs(
            hidden,
            model_file.output_weight(self.chunks[-1]),
            micro,
            self.session,
            vocab_size=self.spec.vocab_size,
            temperature=self.config.rollout.temperature,
            entropy_gradient=entropy_gradient,
        )

    def micro_batches(self, batch: Batch, k: int) -> Iterator[MicroBatch]:
        """Those of mini-batch `k` that this data-parallel rank trains on."""
        session = self.session
        starts = [0, *itertools.accumulate(batch.lengths)]
        align = token_multiple(self.config.policy.fp8, session.layout)
        for indices in micro_batches_of(batch.mini_batches[k]):
            yield make_micro_batch(
                batch,
                indices,
                starts,
                layout=session.layout,
                cp_rank=session.cp_rank,
                align=align,
                device=session.device,
            )

    def run_schedule(self, batch: Batch, k: int, loss: LossFunction, *, forward_only: bool) -> list[Any]:
        """Megatron's schedule over mini-batch `k`: forward and, unless `forward_only`, backward of every
        micro-batch.

        Returns what `loss` reported, in the order of the micro-batches; nothing on earlier pipeline stages.
        """

        def forward_step(iterator: Iterator[tuple[int, MicroBatch]], chunk: Any) -> tuple[torch.Tensor, Any]:
            number, micro = next(iterator)
            return run_model(chunk, micro, self.session), lambda hidden: loss(hidden, micro, number)

        numbered = enumerate(self.micro_batches(batch, k))
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=list(itertools.tee(numbered, len(self.chunks))),
            model=list(self.chunks),
            num_microbatches=len(micro_batches_of(batch.mini_batches[k])),
            seq_length=1,  # the real lengths travel with the tensors (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
        )


def frozen_model(config: RunConfig, session: Session, model: str) -> ModelRunner:
    """A model that is not trained, with the weights of `model` (a folder or hub name) and everything else as
    in the run's configuration: no gradients, no optimizer. UserError for a model that the layout or the
    device cannot do.
    """
    folder = resolve_folder(model)
    spec = read_model(folder)
    rules.check(config, spec, on_cpu=session.backend.name == "cpu")
    chunks = model_file.build(spec, session, config.policy, config.model.dtype, seed=config.run.seed)
    for chunk in chunks:
        chunk.requires_grad_(False)
    model_file.load_weights(chunks, folder, spec, session)
    return ModelRunner(config, session, folder, spec, chunks)


def micro_batches_of(mini: MiniBatch) -> tuple[tuple[int, ...], ...]:
    """The micro-batches of the one data-parallel rank that a part describes."""
    (mine,) = mini.micro_batches
    return mine
