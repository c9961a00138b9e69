"""What only rank 0 has: prompts, engines, verifier and report, wired together.

Nothing else decides what is trained on.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from megatron_dapo import checkpoint
from megatron_dapo.config import RunConfig
from megatron_dapo.data.prompts import PromptStream
from megatron_dapo.data.rows import load_rows, load_sources
from megatron_dapo.errors import UserError
from megatron_dapo.evaluate import evaluate
from megatron_dapo.model_spec import ModelSpec, read_model
from megatron_dapo.policy.control import ControlChannel
from megatron_dapo.policy.session import Session
from megatron_dapo.rendezvous import Store
from megatron_dapo.report.sinks import Reporter
from megatron_dapo.report.step import gap_warning, source_metrics, step_metrics
from megatron_dapo.reward.grading import Grader
from megatron_dapo.rollout.hosts import EngineHost, serve_engines
from megatron_dapo.rollout.rollouts import StopRequested, WeightsNeeded
from megatron_dapo.rollout.service import RolloutService
from megatron_dapo.sync.verify import compare_digests
from megatron_dapo.types import Batch, Collected, Prompt, StepResult
from megatron_dapo.weights.hf import resolve_folder

T = TypeVar("T")
Phase = tuple[str, float, float]  # name, begin and end in seconds of time.monotonic()
# done: with the result; stop: a signal came; push: no engine holds the weights; failed: an error of rank 0
Outcome = tuple[Literal["done", "stop", "push", "failed"], Any]
STOPPING = (signal.SIGTERM, signal.SIGINT)


class Controller:
    """Rank 0's side of a run. `state` is what a checkpoint kept of it, or None for a new run that starts at
    step 0. `hosts` has the name of each rank's, ours first; `store` is what all ranks share.
    """

    def __init__(
        self,
        config: RunConfig,
        spec: ModelSpec,
        folder: Path,
        state: checkpoint.RunState | None,
        hosts: Sequence[str],
        store: Store,
    ) -> None:
        from transformers import AutoTokenizer

        self.config, self.run_dir = config, Path(config.run.dir)
        self.reporter = Reporter(self.run_dir, config, state.step + 1 if state else None)
        self.collected: Collected | None = None  # of the running step
        self._counted_for = -1  # weight version of the step that times and failures are counted for
        tokenizer = AutoTokenizer.from_pretrained(folder)
        data, lag = config.data, config.sampling.most_ahead
        self.prompts = PromptStream(load_sources(data), tokenizer, data, config.run.seed, lag=lag)
        self.held_out = self._held_out(tokenizer)
        self.grader = Grader(config.reward, tokenizer, longest=config.rollout.max_tokens)
        self.service = RolloutService(
            config,
            folder=folder,
            stop_token_ids=spec.eos_token_ids,
            prompts=self.prompts,
            grading=self.grader,
            progress=lambda done, total: self.reporter.progress("collect", done, total),
            message=self.reporter.message,
            watch=self.reporter.fleet,
            hosts=hosts,
            store=store,
        )
        if state:
            assert state.rollouts is not None
            self.service.load_state(state.rollouts)
            self.grader.length_penalty.load_state(state.rollouts["overlong_factor"])
        self._handlers = {sign: signal.signal(sign, self._give_up) for sign in STOPPING}
        self.service.start()  # the servers load while the policy is built

    def take_over(self, step: int, resumed_from: Path | None) -> None:
        """All ranks have their policy, of this step: from now on a signal stops the run between two steps."""
        if moved := checkpoint.set_aside(self.run_dir, step):
            self.reporter.message(f"checkpoints of an earlier run were moved to {moved}")
        started = f"resuming from {resumed_from}" if resumed_from else f"starting in {self.run_dir}"
        self.reporter.message(started)
        for sign in STOPPING:
            signal.signal(sign, self._request_stop)

    def collect(self, version: int) -> Collected:
        """The groups of the next step, sampled by weight version `version` or carried over
        (rollout/collect.py).
        """
        if version != self._counted_for:  # called again after a push of weights, the counts of the step go on
            self._counted_for = version
            self.grader.reset()
            self.service.request_failures.clear()
        self.collected = self.service.next_step(version)
        self.grader.length_penalty.end_step(self.collected.groups)
        return self.collected

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out accuracy, avg@k, as a metric and on the console; empty without evaluation.path."""
        if not self.held_out:
            return {}
        accuracy = evaluate(self.held_out, self.service.submit).accuracy
        when = f"after step {step}" if step else "before training"
        self.reporter.message(f"held-out accuracy {when}: {accuracy:.3f}")
        return {"eval/accuracy": accuracy}

    def measure(
        self,
        step: int,
        batch: Batch,
        result: StepResult,
        *,
        began: float,
        phases: Sequence[Phase],
        num_updates: int,
        memory: Mapping[str, float],
    ) -> dict[str, float]:
        """The metrics of the step that has just ended, and its line of facts; says so when engines and policy
        disagree. Hands the groups that it trained on to the report, for tools/replay.py, and forgets them.
        memory: GiB, by name.
        """
        assert self.collected is not None
        collected, self.collected = self.collected, None
        clock = {name: end - begin for name, begin, end in phases} | {"step": phases[-1][2] - began}
        metrics = step_metrics(
            collected,
            batch,
            result,
            clock,
            version=self._counted_for,
            reward_seconds=self.grader.seconds,
            grades={**self.grader.counts},
            request_failures=self.service.request_failures,
            num_updates=num_updates,
        )
        if warning := gap_warning(metrics, self.config.report.gap_warning):
            self.reporter.message(warning)
        metrics["reward/overlong_factor"] = self.grader.length_penalty.factor
        metrics |= self.prompts.metrics() | source_metrics(collected)
        metrics |= {f"memory/{name}": gib for name, gib in memory.items()}
        metrics |= self.reporter.engine_metrics(phases)
        self.reporter.facts(step, collected, began=began, phases=phases, trained_tokens=result.num_tokens)
        meta = {"num_updates": result.num_updates}
        metrics["time/rollouts_wait"] = self.reporter.rollouts(step, collected.groups, meta)
        return metrics

    def state(self, step: int) -> checkpoint.RunState:
        """What a checkpoint keeps of rank 0, between two steps. The files of the steps that it holds are on
        disk before it is: a resumed run does not make them again.
        """
        self.reporter.flush()
        rollouts = self.service.state() | {"overlong_factor": self.grader.length_penalty.factor}
        return checkpoint.RunState(step=step, rollouts=rollouts)

    def verify(self, export: Path, version: int) -> int:
        """Compare every parameter in every engine with a fresh server on the export; how many were
        compared.
        """
        digests = self.service.load_once(export)
        engines = [name for name, state in self.service.replica_states().items() if state == "ready"]
        tp = self.config.rollout.tensor_parallel
        return compare_digests(digests, engines, tensor_parallel=tp, version=version, export=export)

    def close(self) -> None:
        """Stop engines and grading workers, whatever state they are in."""
        self.grader.close()
        self.service.close()
        self.reporter.close()

    def _held_out(self, tokenizer: Any) -> list[Prompt]:
        path = self.config.evaluation.path
        if path is None:
            return []
        once = self.config.data.model_copy(update={"shuffle": False, "epochs": 1})
        keys = once.prompt_key, once.answer_key
        rows = load_rows(path, *keys, "evaluation.path", rule_key=once.rule_key)
        return list(iter(PromptStream({None: rows}, tokenizer, once, self.config.run.seed).next, None))

    def _give_up(self, number: int, frame: Any) -> None:
        """There is nothing to save yet: do what was done at this signal before, without the engines."""
        self.close()
        signal.signal(number, self._handlers[signal.Signals(number)])
        signal.raise_signal(number)

    def _request_stop(self, number: int, frame: Any) -> None:
        self.reporter.message(
            f"{signal.Signals(number).name}: stopping after the running update, with a checkpoint"
        )
        self.service.interrupt()


def start_engines(
    config: RunConfig, session: Session, state: checkpoint.RunState | None
) -> tuple[Controller | None, EngineHost | None]:
    """Collective. Have the engines of every host started: rank 0 gets its Controller, the first rank of any
    other host what runs the engines there. `state` as for Controller.
    """
    folder = resolve_folder(config.model.path)
    hosts, store = session.hosts(), session.channel.connection()
    engine_host = serve_engines(config, folder, session.rank, hosts, store)
    if session.rank > 0:
        return None, engine_host
    return Controller(config, read_model(folder), folder, state, hosts, store), engine_host


def ignore_signals() -> None:
    """On ranks without a Controller."""
    for sign in STOPPING:
        signal.signal(sign, signal.SIG_IGN)


def on_rank_0(
    work: Callable[[Controller], T],
    controller: Controller | None,
    channel: ControlChannel,
    *,
    push_weights: Callable[[], None],
) -> T:
    """Collective. Run `work` on rank 0, which has the controller, and return its result on every rank.

    When no engine holds the weights any more (all were restarted) every rank pushes them, and `work` is
    called again: what it had finished is still there. StopRequested is raised on all ranks alike; any other
    error on rank 0, and on the others one that says so.
    """
    while True:
        outcome, error = _attempt(work, controller) if controller else (None, None)
        kind, result = channel.share(outcome)
        if kind == "done":
            return result
        if kind == "stop":
            raise StopRequested
        if kind == "failed":
            raise error or UserError("rank 0 has ended the run; its message says why")
        push_weights()


def _attempt(work: Callable[[Controller], Any], controller: Controller) -> tuple[Outcome, Exception | None]:
    """What rank 0 tells the others of `work`, and the error if there was one."""
    try:
        return ("done", work(controller)), None
    except StopRequested:
        return ("stop", None), None
    except WeightsNeeded:
        return ("push", None), None
    except Exception as error:
        return ("failed", None), error
