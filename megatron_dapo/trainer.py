"""The story of a run: set up, then one step after another. Every rank runs this file; rank 0 also holds the Controller.

collect -> advantages -> pack -> old log-probabilities -> updates -> publish -> record -> checkpoint
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_dapo import checkpoint
from megatron_dapo.algo.advantages import with_advantages
from megatron_dapo.algo.packing import Cost, pack
from megatron_dapo.bridge.hf import HFModel
from megatron_dapo.bridge.transfer import WeightBuckets
from megatron_dapo.config import RunConfig
from megatron_dapo.policy.guards import NotFinite
from megatron_dapo.policy.step import Policy, combine
from megatron_dapo.report.rollouts import rollout_path, save_groups
from megatron_dapo.report.sinks import Reporter
from megatron_dapo.report.step import gap_warning, step_metrics
from megatron_dapo.rollout.collect import Collected, SamplingCapReached
from megatron_dapo.rollout.controller import Controller, StopRequested
from megatron_dapo.rollout.engine import EngineDied
from megatron_dapo.rollout.fleet import SyncMismatch
from megatron_dapo.rollout.launch import EngineStartTimeout
from megatron_dapo.types import Batch, Group, StepResult

T = TypeVar("T")
# Ends of a run that explain themselves; the last checkpoint is intact in each case.
EXPECTED = (
    ValueError,
    OSError,
    SamplingCapReached,
    EngineDied,
    EngineStartTimeout,
    NotFinite,
    SyncMismatch,
    checkpoint.SaveFailed,
)


def make_batch(groups: Sequence[Group], config: RunConfig, model: HFModel) -> Batch:
    """Advantages, then micro-batches for the run's layout, balanced by the model's cost (algo/)."""
    samples = with_advantages(groups, normalize=config.objective.advantage, filter_overlong=config.reward.overlong_filter)
    updates = min(config.batch.updates_per_step, len(samples))
    layout = config.layout.to_layout()
    cost = Cost.of_model(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        ffn_size=model.ffn_size * max(1, model.experts_per_token),
        vocab_size=model.vocab_size,
    )
    return pack(
        samples,
        dp=layout.dp,
        num_updates=updates,
        max_tokens=config.batch.max_tokens,
        cost=cost,
        align=layout.sequence_multiple,
        multiple=layout.micro_batch_multiple,
    )


class Trainer:
    """One rank of a run. `run` is the whole of it."""

    def __init__(self, config: RunConfig, *, on_cpu: bool) -> None:
        self.config = config
        self.run_dir = Path(config.run.dir)
        self.step = 0
        self.exhausted = False
        self.clock: dict[str, float] = {}
        self.policy = Policy(config, on_cpu=on_cpu)
        self.weights = WeightBuckets(self.policy.chunks, self.policy.hf, self.policy.place, config.model.dtype)
        self.controller: Controller | None = None  # on rank 0 only
        found = checkpoint.find(self.run_dir, config.checkpoint.resume)
        state = checkpoint.load(found, self.policy) if found else None
        if state:
            self.step = state.step
        self.saved_step = self.step  # nothing is lost that a checkpoint could keep
        if self.policy.place.rank == 0:
            if aside := checkpoint.set_aside(self.run_dir, self.step):
                print(f"checkpoints of an earlier run were moved to {aside}", flush=True)
            reporter = Reporter(self.run_dir, config, self.step + 1 if state else None)
            reporter.message(f"resuming from {found}" if found else f"starting in {self.run_dir}")
            self.controller = Controller(config, self.policy.hf, self.policy.folder, reporter)
            if state:
                self.controller.prompts.load_state(state.prompts)
                self.controller.collector.load_state(state.collector)
        dist.barrier(group=self.policy.place.control)  # from here on rank 0 handles signals; until here they end every rank alike
        if self.policy.place.rank > 0:
            for sign in (signal.SIGTERM, signal.SIGINT):  # rank 0 decides for all when to stop
                signal.signal(sign, signal.SIG_IGN)

    def run(self) -> None:
        """Train until run.max_steps, the end of the data, or a signal; then save and export."""
        try:
            self.with_engines(Controller.connect)
            self.publish()
            if self.step == 0:
                self.record_evaluation()
            while self.step < self.config.run.max_steps and not self.exhausted:
                self.train_step()
            self.finish()
        except StopRequested:
            self.save()
            self.say(
                f"stopped after step {self.step}; resume with the same command (checkpoint.resume=auto run.dir={self.run_dir})"
            )
        finally:
            if self.controller:
                self.controller.close()
                self.controller.reporter.close()

    def train_step(self) -> None:
        """One rollout batch, `batch.updates_per_step` optimizer updates, one weight push."""
        self.clock = {}
        began = time.perf_counter()
        with self.timed("checkpoint"):  # the step before this one is on record by now
            if self.config.checkpoint.every_steps and self.step % self.config.checkpoint.every_steps == 0:
                self.save()
        with self.timed("rollout"):
            collected, batch = self.collect()
        if batch is None:
            self.say("the data ended without another informative group")
            return
        with self.timed("old_logprobs"):
            old_logprobs_T = self.policy.logprobs(batch) if len(batch.mini_batches) > 1 else None
        with self.timed("update"):
            result = self.update(batch, old_logprobs_T)
        self.step += 1
        with self.timed("sync"):
            self.publish()
        self.clock["step"] = time.perf_counter() - began
        self.record(collected, batch, result)

    def collect(self) -> tuple[Collected | None, Batch | None]:
        """Dynamic sampling on rank 0 (rollout/collect.py); every rank gets the packed batch (algo/packing.py)."""

        def work(controller: Controller) -> tuple[Batch | None, bool]:
            nonlocal collected
            collected = controller.collect()
            if not collected.groups:
                return None, True
            return make_batch(collected.groups, self.config, self.policy.hf), collected.exhausted

        collected: Collected | None = None
        batch, self.exhausted = self.with_engines(work)
        return collected, batch

    def update(self, batch: Batch, old_logprobs_T: torch.Tensor | None) -> StepResult:
        """All optimizer updates of the step (policy/step.py)."""
        results = []
        for k in range(len(batch.mini_batches)):
            try:
                results.append(self.policy.update(batch, k, old_logprobs_T))
            except NotFinite as error:
                dump = self.run_dir / f"failed_batch_step_{self.step + 1:06d}.pt"
                if self.controller:
                    torch.save(batch, dump)
                raise NotFinite(f"{error}; the batch is in {dump}") from error
            for warning in results[-1].warnings:
                self.say(warning)
            if self.controller:
                self.controller.reporter.progress("update", k + 1, len(batch.mini_batches))
        return combine(results)

    def publish(self) -> None:
        """Push the weights to every engine, bucket by bucket (bridge/). An engine that dies is replaced when it is next needed."""
        push = self.controller
        try:
            if push:
                push.start_push()
        except (EngineDied, TimeoutError):
            push = None
        for bucket in self.weights:
            try:
                if push:
                    push.push(bucket, self.step)
            except (EngineDied, TimeoutError):
                push = None
        try:
            if push:
                push.finish_push(self.step)
        except (EngineDied, TimeoutError):
            pass

    def record(self, collected: Collected | None, batch: Batch, result: StepResult) -> None:
        """Metrics, rollouts, and the periodic evaluation of this step."""
        metrics: dict[str, float] = {}
        if self.controller and collected:
            metrics = step_metrics(collected, batch, result, self.clock, self.controller.reward_seconds, self.policy.num_updates)
            if warning := gap_warning(metrics, self.config.report.gap_warning):
                self.say(warning)
            if self.config.report.rollouts:
                save_groups(
                    rollout_path(self.run_dir, self.step), collected.groups, self.step, {"num_updates": result.num_updates}
                )
        every = self.config.evaluation.every_steps
        try:
            last = self.step == self.config.run.max_steps or self.exhausted
            accuracy = self.evaluate() if last or (every and self.step % every == 0) else None
            if accuracy is not None:
                metrics["eval/accuracy"] = accuracy
                self.say(f"held-out accuracy after step {self.step}: {accuracy:.3f}")
        finally:
            if self.controller:
                self.controller.reporter.record(self.step, metrics)

    def evaluate(self) -> float | None:
        """Held-out accuracy (evaluate.py); None without evaluation.path."""
        return self.with_engines(lambda controller: controller.evaluate().accuracy if controller.evaluates else None)

    def record_evaluation(self) -> None:
        accuracy = self.evaluate()
        if self.controller and accuracy is not None:
            self.controller.reporter.record(0, {"eval/accuracy": accuracy})
            self.say(f"held-out accuracy before training: {accuracy:.3f}")

    def save(self) -> None:
        """A checkpoint of the steps done so far (checkpoint.py), unless there is one."""
        if self.saved_step == self.step:
            return
        state = None
        if self.controller:
            state = checkpoint.RunState(
                step=self.step, prompts=self.controller.prompts.state(), collector=self.controller.collector.state()
            )
        checkpoint.save(self.run_dir, self.policy, state, self.config.checkpoint.keep)
        self.saved_step = self.step

    def finish(self) -> None:
        """Final checkpoint and Hugging Face export."""
        self.save()
        if self.config.checkpoint.export_hf:
            self.weights.export(self.run_dir / "hf", self.policy.folder)
            self.say(f"exported {self.run_dir / 'hf'}")
        if self.config.run.verify_sync:
            compared = self.with_engines(lambda controller: controller.verify(self.run_dir / "hf"))
            self.say(f"verified: {compared} parameters in the engines equal those of a fresh server on the export")

    def with_engines(self, work: Callable[[Controller], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank.

        When an engine dies meanwhile, it is restarted, all ranks push the weights again, and `work` is called again: what it
        had finished is still there. StopRequested is raised on all ranks alike.
        """
        while True:
            outcome: tuple[str, Any] | None = None
            if self.controller:
                try:
                    outcome = ("done", work(self.controller))
                except StopRequested:
                    outcome = ("stop", None)
                except (EngineDied, TimeoutError) as error:
                    self.controller.reporter.message(f"{type(error).__name__}: {error}")
                    self.controller.restart_engines()
                    outcome = ("push again", None)
            kind, value = self.share(outcome)
            if kind == "done":
                return value  # type: ignore[return-value]
            if kind == "stop":
                raise StopRequested
            self.publish()

    def share(self, value: T | None) -> T:
        """Rank 0's value on every rank."""
        told = [value]
        dist.broadcast_object_list(told, src=0, group=self.policy.place.control)
        return told[0]  # type: ignore[return-value]

    def say(self, text: str) -> None:
        if self.controller:
            self.controller.reporter.message(text)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.clock[name] = time.perf_counter() - began
