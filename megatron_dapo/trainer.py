"""The story of a run: set up, then one step after another. Every rank runs this file; rank 0 also holds the
Controller.

collect -> samples -> pack -> (engines sleep) -> streams -> updates -> (they wake) -> publish -> record
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from megatron_dapo import checkpoint
from megatron_dapo.batching.step_batch import make_batch
from megatron_dapo.colocation import Colocation
from megatron_dapo.config import RunConfig
from megatron_dapo.controller import Controller, Phase, ignore_signals, on_rank_0, start_engines
from megatron_dapo.objectives import make_objective
from megatron_dapo.policy import session
from megatron_dapo.policy.backend import Backend
from megatron_dapo.policy.batches import scatter
from megatron_dapo.policy.guards import kept_if_not_finite
from megatron_dapo.policy.step import Policy, combine
from megatron_dapo.rollout.rollouts import StopRequested
from megatron_dapo.rollout.server import engines_sleep
from megatron_dapo.sync.publish import make_publisher
from megatron_dapo.types import Batch, StepResult, UpdateResult

T = TypeVar("T")


class Trainer:
    """One rank of a run. `run` is the whole of it."""

    def __init__(self, config: RunConfig, backend: Backend) -> None:
        self.config, self.run_dir = config, Path(config.run.dir)
        self.exhausted, self.phases = False, list[Phase]()  # of the running step
        self.session = session.start(config.layout.to_layout(), backend)
        self.objective = make_objective(config.objective, max_age=config.sampling.max_age)
        self.resumed_from, state = checkpoint.choose(self.run_dir, config.checkpoint.resume, self.session)
        self.step = state.step if state else 0
        self.keeper = checkpoint.Keeper(config, self.session, self.step)
        self.batch: Batch | None = None  # rank 0: the whole batch of the running step
        self.controller, self.engine_host = start_engines(config, self.session, state)
        self.colocation = Colocation(self.session, self.controller, takes_turns=engines_sleep(config))

    def build(self) -> None:
        """The policy and its weights, while the engines start; if they share its devices, when they sleep."""
        if self.colocation.takes_turns:
            self.on_rank_0(lambda controller: controller.service.wait_ready())
            self.colocation.to_policy(None)
        self.policy = Policy(self.config, self.session, self.objective)
        rank, control, device = self.session.rank, self.session.control, self.session.device
        hosts, store = self.session.hosts(), self.session.channel.connection()
        self.publisher = make_publisher(self.config, self.policy.spec, rank, hosts, control, store, device)
        if self.resumed_from:
            checkpoint.load(self.resumed_from, self.policy)
        if self.controller:
            self.controller.take_over(self.step, self.resumed_from)
        self.session.channel.share()  # rank 0 handles signals now; until here they ended every rank alike
        if not self.controller:
            ignore_signals()  # rank 0 decides for all when to stop

    def run(self) -> None:
        """Train until run.max_steps, the end of the data, or a signal; then save and export."""
        try:
            self.build()
            self.colocation.to_engines(self.policy)
            self.on_rank_0(lambda controller: controller.service.wait_ready())
            self.publish()
            if self.step == 0:
                accuracy = self.evaluate()
                if self.controller and accuracy:
                    self.controller.reporter.record(0, accuracy)
            while self.step < self.config.run.max_steps and not self.exhausted:
                self.train_step()
            self.finish()
        except StopRequested:
            self.keeper.save(self.policy, self.step, self.state, wait=True)
            self.say(
                f"stopped after step {self.step}; resume with the same command "
                f"(checkpoint.resume=auto run.dir={self.run_dir})"
            )
        finally:
            if self.controller:
                self.controller.close()
        self.session.channel.share()  # rank 0 has stopped every engine: none ends with the rank of its host

    def train_step(self) -> None:
        """One rollout batch, `batch.updates_per_step` optimizer updates, one weight push."""
        self.phases = []
        began = time.monotonic()
        with self.timed("checkpoint"):  # the step before this one is on record by now
            self.keeper.keep(self.policy, self.step, self.state, self.say)
        with self.timed("rollout"):
            batch = self.collect()
        if batch is None:
            return self.say("the data ended without another informative group")
        with self.timed("sleep"):
            self.colocation.to_policy(self.policy)
        with self.timed("old_logprobs"):
            batch = self.policy.streams(batch)
        with self.timed("update"):
            result = self.update(batch)
        self.step += 1
        with self.timed("wake"):
            self.colocation.to_engines(self.policy)
        with self.timed("sync"):
            self.publish()
        self.record(batch, result, began)

    def collect(self) -> Batch | None:
        """Dynamic sampling on rank 0 (rollout/), packed (batching/); every rank gets what it trains on."""

        def next_batch(controller: Controller) -> tuple[bool, bool]:
            collected = controller.collect(self.step)
            if collected.groups:
                self.batch = make_batch(
                    collected.groups, self.config, self.policy.spec, self.objective, version=self.step
                )
            return bool(collected.groups), collected.exhausted or not collected.groups

        has_groups, self.exhausted = self.on_rank_0(next_batch)
        return scatter(self.batch, self.session) if has_groups else None

    def update(self, batch: Batch) -> StepResult:
        """All optimizer updates of the step (policy/step.py)."""
        results: list[UpdateResult] = []
        for k in range(len(batch.mini_batches)):
            with kept_if_not_finite(self.batch, self.run_dir / f"failed_batch_step_{self.step + 1:06d}.pt"):
                results.append(self.policy.update(batch, k))
            for warning in results[-1].warnings:
                self.say(warning)
            if self.controller:
                self.controller.reporter.progress("update", k + 1, len(batch.mini_batches))
        self.batch = None
        return combine(results)

    def publish(self) -> None:
        """Push the weights to every engine (sync/). One that fails is left behind, and restarted."""
        with self.controller.service.paused() if self.controller else nullcontext() as replicas:
            self.session.channel.share()  # rank 0's engines stand still, however long that took
            report = self.publisher.publish(self.policy.held_shards(), self.step, replicas)
        for failure in report.failures:
            self.say(str(failure))

    def record(self, batch: Batch, result: StepResult, began: float) -> None:
        """Metrics, facts, rollouts, and the periodic evaluation of this step."""
        metrics: dict[str, float] = {}
        if self.controller:
            times = {"began": began, "phases": self.phases}
            held = {"num_updates": self.policy.num_updates, "memory": self.colocation.memory}
            metrics = self.controller.measure(self.step, batch, result, **times, **held)
        every, last = self.config.evaluation.every_steps, self.step == self.config.run.max_steps
        try:
            if last or self.exhausted or (every and self.step % every == 0):
                metrics |= self.evaluate()
        finally:
            if self.controller:
                self.controller.reporter.record(self.step, metrics)

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy as a metric (evaluate.py); empty without evaluation.path."""
        return self.on_rank_0(lambda controller: controller.evaluate(self.step))

    def state(self) -> checkpoint.RunState | None:
        """What a checkpoint keeps beside the policy; None on other ranks than 0."""
        return self.controller.state(self.step) if self.controller else None

    def finish(self) -> None:
        """Final checkpoint and Hugging Face export."""
        self.keeper.save(self.policy, self.step, self.state, wait=True)
        if self.config.checkpoint.export_hf:
            self.say(f"exported {checkpoint.export_hf(self.run_dir / 'hf', self.policy, self.step)}")
        if self.config.run.verify_sync:
            compared = self.on_rank_0(lambda controller: controller.verify(self.run_dir / "hf", self.step))
            self.say(f"verified: {compared} parameters in the engines equal a fresh server's on the export")

    def on_rank_0(self, work: Callable[[Controller], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank (controller.py)."""
        return on_rank_0(work, self.controller, self.session.channel, push_weights=self.publish)

    def say(self, text: str) -> None:
        if self.controller:
            self.controller.reporter.message(text)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.phases.append((name, began, time.monotonic()))
