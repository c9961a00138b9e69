"""The policy: log-probabilities of a batch and one optimizer update, through Megatron's pipeline schedule.

The loss function returns sums; `finalize_model_grads` divides once by the tokens of the whole mini-batch, over all
data-parallel ranks and micro-batches (Megatron's `calculate_per_token_loss` contract).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dapo.algo.loss import dapo_loss
from megatron_dapo.bridge.hf import HFModel, read_model, resolve_folder
from megatron_dapo.config import RunConfig
from megatron_dapo.policy import cpu, fp8_rules, parallel
from megatron_dapo.policy import model as model_file
from megatron_dapo.policy.forward import MicroBatch, make_micro_batch, response_logprobs, run_model
from megatron_dapo.policy.optimizer import build_optimizer, build_schedule
from megatron_dapo.report.metrics import Max, Mean, merge
from megatron_dapo.types import Batch, StepResult

SUMS = ("loss", "num_tokens", "fresh_tokens", "entropy", "clip_low", "clip_high", "kl_old", "gap")


class NonFiniteLoss(RuntimeError):
    """Loss or gradient norm is NaN or infinite; the parameters are those before the update unless the message says otherwise."""


class Policy:
    """The trained model on this rank. Every method is collective: all ranks call it with the same batch."""

    def __init__(self, config: RunConfig, *, on_cpu: bool) -> None:
        self.config = config
        self.folder = resolve_folder(config.model.path)
        self.hf: HFModel = read_model(self.folder)
        layout, fp8 = config.layout.to_layout(), config.policy.fp8
        if fp8 is not None:
            fp8_rules.check(fp8, self.hf, layout, config.model.dtype, on_cpu=on_cpu)
        if on_cpu:
            cpu.install()
        self.place = parallel.start(layout, "gloo" if on_cpu else "nccl")
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        self.chunk = model_file.build(
            self.hf,
            self.place,
            config.model.dtype,
            on_cpu=on_cpu,
            distributed_optimizer=config.optimizer.distributed,
            seed=config.run.seed,
            fp8=fp8,
        )
        model_file.load_weights(self.chunk, self.folder, self.hf, self.place)
        self.optimizer = build_optimizer(config.optimizer, self.chunk, config.model.dtype, None if on_cpu else fp8)
        self.schedule = build_schedule(config.optimizer, self.optimizer)
        self.chunk.config.finalize_model_grads_func = finalize_model_grads
        self.chunk.config.grad_scale_func = self.optimizer.scale_loss
        self.num_updates = 0

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probability of every trained token under the present weights: [T] over the whole batch, 0 elsewhere.

        The same tensor on every rank.
        """
        flat_T = torch.zeros(batch.tokens_T.numel())

        def collect(logits: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict]:
            logprobs_R, _ = self._response_logprobs(logits, micro)
            if self.place.tp_rank == 0:
                flat_T[micro.flat_R] = logprobs_R.cpu()
            return logprobs_R.sum(), torch.zeros((), dtype=torch.int, device=self.device), {}

        with torch.no_grad():
            for k in range(len(batch.mini_batches)):
                self._schedule(batch, k, collect, forward_only=True)
        dist.all_reduce(flat_T, group=self.place.control)
        return flat_T

    def update(self, batch: Batch, k: int, old_logprobs_T: torch.Tensor | None = None) -> StepResult:
        """One optimizer update on mini-batch `k`.

        `old_logprobs_T` [T] comes from `logprobs`; None means the policy has not moved since collection, so the ratio is 1.
        NonFiniteLoss is raised on all ranks before the weights are touched.
        """
        mini, objective = batch.mini_batches[k], self.config.objective

        def loss(logits: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict]:
            logprobs_R, entropy_R = self._response_logprobs(logits, micro)
            old_R = logprobs_R.detach() if old_logprobs_T is None else old_logprobs_T[micro.flat_R].to(self.device)
            sums = dapo_loss(
                logprobs_R,
                old_R,
                micro.advantages_R,
                torch.ones_like(micro.rows_R, dtype=torch.bool),
                eps_low=objective.eps_low,
                eps_high=objective.eps_high,
                dual_clip=objective.dual_clip,
            )
            gap_R = torch.where(micro.fresh_R, (old_R - micro.rollout_logprobs_R).abs(), 0.0)
            clips = (sums.clip_low, sums.clip_high, sums.kl_old)
            report = (sums.loss.detach(), sums.num_tokens, micro.fresh_R.sum(), entropy_R.sum(), *clips, gap_R.sum())
            stacked = torch.stack([x.double().cpu() for x in report])
            return sums.loss, sums.num_tokens.int(), {"sums": stacked, "gap_max": float(gap_R.max()) if gap_R.numel() else 0.0}

        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._schedule(batch, k, loss, forward_only=False)
        totals, gap_max = self._gather(outputs)
        if not math.isfinite(totals["loss"]):
            raise NonFiniteLoss(f"the loss of update {self.num_updates + 1} is {totals['loss']}; the weights were not changed")
        assert int(totals["num_tokens"]) == mini.num_tokens, (totals["num_tokens"], mini.num_tokens)
        self.schedule.step(increment=1)
        _, grad_norm, _ = self.optimizer.step()
        grad_norm = float(grad_norm or 0.0)
        if not math.isfinite(grad_norm):
            raise NonFiniteLoss(
                f"the gradient norm of update {self.num_updates + 1} is {grad_norm}; resume from the last checkpoint"
            )
        self.num_updates += 1
        tokens = max(mini.num_tokens, 1)
        return StepResult(
            loss=totals["loss"] / tokens,
            grad_norm=grad_norm,
            num_tokens=mini.num_tokens,
            num_updates=1,
            num_micro_batches=len(mini.micro_batches[0]),
            lr=self.optimizer.param_groups[0]["lr"],
            metrics={name: Mean(totals[name], mini.num_tokens) for name in SUMS[2:-1]}
            | {"gap": Mean(totals["gap"], totals["fresh_tokens"]), "gap_max": Max(gap_max)},
        )

    def _response_logprobs(self, logits: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        temperature = self.config.rollout.temperature
        return response_logprobs(logits, micro, self.place, vocab_size=self.hf.vocab_size, temperature=temperature)

    def _micro_batches(self, batch: Batch, k: int) -> Iterator[MicroBatch]:
        starts = [0, *itertools.accumulate(batch.lengths)]
        align = fp8_rules.token_multiple(self.config.policy.fp8, self.place.layout)
        for indices in batch.mini_batches[k].micro_batches[self.place.dp_rank]:
            yield make_micro_batch(batch, indices, starts, align=align, device=self.device)

    def _schedule(self, batch: Batch, k: int, loss: Callable[..., Any], *, forward_only: bool) -> list[dict]:
        def forward_step(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            micro = next(iterator)
            return run_model(chunk, micro, self.place), lambda logits: loss(logits, micro)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=self._micro_batches(batch, k),
            model=[self.chunk],
            num_microbatches=len(batch.mini_batches[k].micro_batches[0]),
            seq_length=1,  # the real lengths travel with the tensors (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _gather(self, outputs: list[dict]) -> tuple[dict[str, float], float]:
        """Sums over micro-batches and data-parallel ranks, on every rank."""
        values = torch.zeros(len(SUMS), dtype=torch.float64)
        peak = torch.zeros(1, dtype=torch.float64)
        if self.place.reports_loss:
            for output in outputs:
                values += output["sums"]
                peak = torch.maximum(peak, torch.tensor([output["gap_max"]], dtype=torch.float64))
        dist.all_reduce(values, group=self.place.control)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self.place.control)
        return dict(zip(SUMS, values.tolist(), strict=True)), float(peak)


def combine(results: list[StepResult]) -> StepResult:
    """The report of a step: token-weighted means over its updates; learning rate and count of the last."""
    tokens = sum(r.num_tokens for r in results)
    weights = [r.num_tokens / max(tokens, 1) for r in results]

    def mean(values: Iterator[float]) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True))

    return StepResult(
        loss=mean(r.loss for r in results),
        grad_norm=mean(r.grad_norm for r in results),
        num_tokens=tokens,
        num_updates=len(results),
        num_micro_batches=sum(r.num_micro_batches for r in results),
        lr=results[-1].lr,
        metrics=merge(r.metrics for r in results),
    )
