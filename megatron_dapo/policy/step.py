"""The policy: log-probabilities of a batch and one optimizer update, through Megatron's pipeline schedule.

The loss function returns sums; `finalize_model_grads` divides once by the tokens of the whole mini-batch, over all
data-parallel ranks and micro-batches (Megatron's `calculate_per_token_loss` contract).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dapo.algo.loss import dapo_loss
from megatron_dapo.algo.mismatch import correct, importance_weights, mismatch_sums
from megatron_dapo.bridge.hf import HFModel, read_model, resolve_folder
from megatron_dapo.config import RunConfig
from megatron_dapo.policy import cpu, fp8_rules, parallel
from megatron_dapo.policy import model as model_file
from megatron_dapo.policy.forward import MicroBatch, make_micro_batch, response_logprobs, run_model
from megatron_dapo.policy.guards import Guard
from megatron_dapo.policy.optimizer import apply_gradients, build_optimizer, build_schedule, ready_gradients
from megatron_dapo.report.metrics import Count, EffectiveSize, Max, Mean, Metric, merge
from megatron_dapo.types import Batch, MiniBatch, StepResult

OF_TRAINED = ("clip_low", "clip_high", "kl_old")  # sums over the tokens in the loss
OF_ALL = ("entropy", "fresh_tokens", "kl_k1", "kl_k3", "masked")  # over these and those the mismatch correction masked
SUMS = ("loss", "num_tokens", *OF_TRAINED, *OF_ALL, "gap", "weights", "squares")


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
        self.chunks = model_file.build(
            self.hf,
            self.place,
            config.policy,
            config.model.dtype,
            on_cpu=on_cpu,
            distributed_optimizer=config.optimizer.distributed,
            seed=config.run.seed,
        )
        model_file.load_weights(self.chunks, self.folder, self.hf, self.place)
        self.optimizer = build_optimizer(config.optimizer, self.chunks, config.model.dtype, None if on_cpu else fp8)
        self.schedule = build_schedule(config.optimizer, self.optimizer)
        self.guard = Guard(config.optimizer, self.place)
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = self.guard.finalize
            chunk.config.grad_scale_func = self.optimizer.scale_loss
        self.num_updates = 0

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probability of every trained token under the present weights: [T] over the whole batch, 0 elsewhere.

        The same tensor on every rank.
        """
        flat_T = torch.zeros(batch.tokens_T.numel())

        def collect(hidden: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict]:
            logprobs_R, _ = self._response_logprobs(hidden, micro)
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
        NotFinite is raised on all ranks; with optimizer.on_nonfinite=skip_update the update is left out instead, which
        advances neither `num_updates` nor the schedule.
        """
        mini = batch.mini_batches[k]
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._schedule(batch, k, partial(self._loss, old_logprobs_T), forward_only=False)
        totals, gap_max = self._gather(outputs)
        grad_norm = ready_gradients(self.optimizer)
        micro_losses = [float(output["sums"][0]) for output in outputs] if self.place.reports_loss else []
        if trouble := self.guard.trouble(totals["loss"], micro_losses, grad_norm, batch, old_logprobs_T):
            return self._skipped(self.guard.skip(trouble, self.num_updates + 1), mini)
        assert int(totals["num_tokens"] + totals["masked"]) == mini.num_tokens, (totals, mini.num_tokens)
        self.schedule.step(increment=1)
        apply_gradients(self.optimizer, self.config.optimizer.clip_grad, grad_norm)
        self.num_updates += 1
        self.guard.check_parameters(self.num_updates)
        spike = self.guard.spike(grad_norm, self.num_updates)
        return StepResult(
            loss=totals["loss"] / max(totals["num_tokens"], 1),
            grad_norm=grad_norm,
            num_tokens=int(totals["num_tokens"]),
            num_updates=1,
            num_micro_batches=len(mini.micro_batches[0]),
            lr=self.optimizer.param_groups[0]["lr"],
            metrics=_metrics(totals, gap_max, mini.num_tokens)
            | {"skipped_updates": Count(0), "grad_norm_spike": Count(bool(spike))},
            warnings=(spike,) * bool(spike),
        )

    def _loss(
        self, old_logprobs_T: torch.Tensor | None, hidden: torch.Tensor, micro: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Megatron's contract for one micro-batch: the sum of the loss, the number of tokens in it, what to report (SUMS)."""
        objective = self.config.objective
        logprobs_R, entropy_R = self._response_logprobs(hidden, micro)
        old_R = logprobs_R.detach() if old_logprobs_T is None else old_logprobs_T[micro.flat_R].to(self.device)
        weights_R = importance_weights(
            old_R,
            micro.rollout_logprobs_R,
            micro.samples_R,
            level=objective.mismatch_level,
            num_samples=len(micro.bounds) - 1,
            group=self.place.cp_group,
        )
        factors_R, stay_R = correct(
            weights_R,
            correction=objective.mismatch_correction,
            low=objective.mismatch_low,
            high=objective.mismatch_high,
        )
        sums = dapo_loss(
            logprobs_R,
            old_R,
            micro.advantages_R,
            stay_R,
            factors_R,
            eps_low=objective.eps_low,
            eps_high=objective.eps_high,
            dual_clip=objective.dual_clip,
        )
        gaps = mismatch_sums(old_R, micro.rollout_logprobs_R, micro.fresh_R, weights_R, stay_R)
        report = (sums.loss.detach(), sums.num_tokens, sums.clip_low, sums.clip_high, sums.kl_old)  # as in SUMS
        report += (entropy_R.sum(), micro.fresh_R.sum(), gaps.kl_k1, gaps.kl_k3, gaps.masked)
        report += (gaps.gap, gaps.weights, gaps.squares)
        stacked = torch.stack([x.double() for x in (*report, gaps.gap_max)]).cpu()
        return sums.loss, sums.num_tokens.int(), {"sums": stacked[:-1], "gap_max": float(stacked[-1])}

    def _skipped(self, warning: str, mini: MiniBatch) -> StepResult:
        """An update that did not happen: counted, and nothing of it in the other metrics."""
        return StepResult(
            loss=math.nan,
            grad_norm=math.nan,
            num_tokens=0,
            num_updates=0,
            num_micro_batches=len(mini.micro_batches[0]),
            lr=self.optimizer.param_groups[0]["lr"],
            metrics=_metrics(dict.fromkeys(SUMS, 0.0), -math.inf, 0) | {"skipped_updates": Count(1), "grad_norm_spike": Count(0)},
            warnings=(warning,),
        )

    def _response_logprobs(self, hidden: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        weight, temperature = model_file.output_weight(self.chunks[-1]), self.config.rollout.temperature
        return response_logprobs(hidden, weight, micro, self.place, vocab_size=self.hf.vocab_size, temperature=temperature)

    def _micro_batches(self, batch: Batch, k: int) -> Iterator[MicroBatch]:
        starts = [0, *itertools.accumulate(batch.lengths)]
        layout = self.place.layout
        align = fp8_rules.token_multiple(self.config.policy.fp8, layout)
        for indices in batch.mini_batches[k].micro_batches[self.place.dp_rank]:
            yield make_micro_batch(
                batch, indices, starts, layout=layout, cp_rank=self.place.cp_rank, align=align, device=self.device
            )

    def _schedule(self, batch: Batch, k: int, loss: Callable[..., Any], *, forward_only: bool) -> list[dict]:
        def forward_step(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            micro = next(iterator)
            return run_model(chunk, micro, self.place), lambda hidden: loss(hidden, micro)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=list(itertools.tee(self._micro_batches(batch, k), len(self.chunks))),
            model=list(self.chunks),
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


def _metrics(totals: dict[str, float], gap_max: float, num_tokens: int) -> dict[str, Metric]:
    """`num_tokens` of the mini-batch, those that the mismatch correction masked included."""
    return {
        **{name: Mean(totals[name], totals["num_tokens"]) for name in OF_TRAINED},
        **{name: Mean(totals[name], num_tokens) for name in OF_ALL},
        "gap": Mean(totals["gap"], totals["fresh_tokens"]),
        "gap_max": Max(gap_max),
        "ess": EffectiveSize(totals["weights"], totals["squares"], num_tokens),
    }


def combine(results: list[StepResult]) -> StepResult:
    """The report of a step: token-weighted means over its updates, skipped ones left out; learning rate of the last."""
    tokens = sum(r.num_tokens for r in results)
    done = [r for r in results if r.num_updates]

    def mean(values: Iterator[float]) -> float:
        if not done:
            return math.nan
        return sum(r.num_tokens / max(tokens, 1) * v for r, v in zip(done, values, strict=True))

    return StepResult(
        loss=mean(r.loss for r in done),
        grad_norm=mean(r.grad_norm for r in done),
        num_tokens=tokens,
        num_updates=len(done),
        num_micro_batches=sum(r.num_micro_batches for r in results),
        lr=results[-1].lr,
        metrics=merge(r.metrics for r in results),
        warnings=tuple(text for r in results for text in r.warnings),
    )
