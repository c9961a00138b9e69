"""What only rank 0 does: it owns the prompts, the engines, the verifier and the report. Nothing else decides what is trained on."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron_dapo.bridge.hf import HFModel
from megatron_dapo.bridge.transfer import Bucket
from megatron_dapo.config import RunConfig
from megatron_dapo.data.prompts import PromptStream, load_rows
from megatron_dapo.evaluate import Evaluation, evaluate
from megatron_dapo.report.sinks import Reporter
from megatron_dapo.reward.overlong import overlong_penalty
from megatron_dapo.reward.pool import GradingPool
from megatron_dapo.rollout.collect import Collected, Collector
from megatron_dapo.rollout.engine import EngineDied
from megatron_dapo.rollout.fleet import Fleet
from megatron_dapo.types import Group, Prompt

T = TypeVar("T")


class StopRequested(Exception):
    """SIGTERM or Ctrl-C: the step that was being collected is given up, everything finished before it is kept."""


class Controller:
    """Synchronous face of the asyncio work of rank 0. Every method that talks to engines may raise EngineDied or StopRequested."""

    def __init__(self, config: RunConfig, hf: HFModel, folder: Path, reporter: Reporter) -> None:
        from transformers import AutoTokenizer

        self.config, self.reporter = config, reporter
        self.weight_version = 0
        self._synced = False  # every engine holds weight_version
        self.stopping = False
        self.reward_seconds = 0.0
        self._runner = asyncio.Runner()
        self._task: asyncio.Task[Any] | None = None
        longest = config.data.max_prompt_tokens + config.rollout.max_tokens
        self.fleet = Fleet(config, model=folder, max_model_len=longest, stop_token_ids=hf.eos_token_ids)
        self.fleet.start()  # the servers load while the rest is set up
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        data = config.data
        self.prompts = PromptStream(
            load_rows(data.path or "", data.prompt_key, data.answer_key), self.tokenizer, data, config.run.seed
        )
        self.pool = GradingPool(config.reward.verifier, config.reward.workers, config.reward.timeout_s)
        self.collector = Collector(
            prompts=self.prompts,
            sample=self._sample_to_train,
            config=config.sampling,
            waves=config.rollout.seeded,
            progress=lambda done, total: reporter.progress("collect", done, total),
        )
        self._eval_prompts = self._load_evaluation()
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, self._request_stop)

    def connect(self) -> None:
        self.run(self.fleet.connect)

    def collect(self) -> Collected:
        """The groups of the next step (rollout/collect.py)."""
        self._check_synced()
        self.reward_seconds = 0.0
        return self.run(lambda: self.collector.collect(self.weight_version))

    def evaluate(self) -> Evaluation:
        self._check_synced()
        return self.run(lambda: evaluate(self._eval_prompts, self._sample_to_evaluate))

    @property
    def evaluates(self) -> bool:
        return bool(self._eval_prompts)

    def start_push(self) -> None:
        self._synced = False
        self.finish(lambda: self.fleet.on_all(lambda engine: engine.start_weight_update()))

    def push(self, bucket: Bucket, version: int) -> None:
        info = bucket.update_info(version)
        self.finish(lambda: self.fleet.on_all(lambda engine: engine.update_weights(info)))

    def finish_push(self, version: int) -> None:
        """Cached keys and values belong to the old weights, so they go too."""

        async def finish(engine: Any) -> None:
            await engine.finish_weight_update(str(version))
            await engine.reset_prefix_cache()

        self.finish(lambda: self.fleet.on_all(finish))
        self.weight_version, self._synced = version, True

    def verify(self, export: Path) -> int:
        self._check_synced()
        return self.run(lambda: self.fleet.verify(export, self.weight_version))

    def restart_engines(self) -> None:
        for index in self.finish(self.fleet.restart_dead):
            self.reporter.message(f"engine {index} was restarted; see {self.fleet.servers[index].log_path}")

    def close(self) -> None:
        """Stop engines and workers, whatever state they are in."""
        self.pool.close()
        self.finish(self.fleet.close)
        self._runner.close()

    def run(self, make: Callable[[], Awaitable[T]]) -> T:
        """Run one coroutine on this rank's event loop. A signal ends it with StopRequested."""

        async def main() -> T:
            self._task = asyncio.current_task()
            try:
                return await make()
            finally:
                self._task = None

        if self.stopping:
            raise StopRequested
        try:
            return self._runner.run(main())
        except asyncio.CancelledError:
            raise StopRequested from None

    def finish(self, make: Callable[[], Awaitable[T]]) -> T:
        """Run one coroutine to its end, signal or not: all ranks take part in what it belongs to."""

        async def main() -> T:
            return await make()

        return self._runner.run(main())

    def _check_synced(self) -> None:
        """EngineDied after a push that did not end: the engines that live hold a mixture, which nothing may be sampled from."""
        if not self._synced:
            raise EngineDied("an engine died while the weights were pushed")

    def _request_stop(self, number: int, frame: Any) -> None:
        if self.stopping:
            return
        self.stopping = True
        self.reporter.message(f"{signal.Signals(number).name}: stopping after the running update, with a checkpoint")
        if self._task is not None:
            self._runner.get_loop().call_soon_threadsafe(self._task.cancel)

    def _load_evaluation(self) -> list[Prompt]:
        path = self.config.evaluation.path
        if path is None:
            return []
        once = self.config.data.model_copy(update={"shuffle": False, "epochs": 1})
        rows = load_rows(path, once.prompt_key, once.answer_key, "evaluation.path")
        stream = PromptStream(rows, self.tokenizer, once, self.config.run.seed)
        return list(iter(stream.next, None))

    async def _sample_to_train(self, prompt: Prompt) -> Group:
        # No top-p or top-k: log-probabilities of a truncated distribution would not be the policy's.
        n, temperature = self.config.sampling.samples_per_prompt, self.config.rollout.temperature
        return await self._sample(prompt, n=n, temperature=temperature, top_p=1.0)

    async def _sample_to_evaluate(self, prompt: Prompt) -> Group:
        options = self.config.evaluation
        return await self._sample(prompt, n=options.samples, temperature=options.temperature, top_p=options.top_p)

    async def _sample(self, prompt: Prompt, *, n: int, temperature: float, top_p: float) -> Group:
        """Sample and grade the completions of one prompt."""
        completions = await self.fleet.generate(
            prompt.tokens, n=n, temperature=temperature, top_p=top_p, seed=self._seed(prompt), weight_version=self.weight_version
        )
        texts = self.tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
        began = time.perf_counter()
        grades = await self.pool.grade(texts, prompt.answer)
        self.reward_seconds += time.perf_counter() - began
        cache, longest = self.config.reward.overlong_cache, self.config.rollout.max_tokens
        return Group(
            prompt=prompt,
            completions=tuple(dataclasses.replace(c, text=text) for c, text in zip(completions, texts, strict=True)),
            correct=tuple(grade.correct for grade in grades),
            rewards=tuple(
                (1.0 if grade.correct else -1.0) + overlong_penalty(len(c.tokens), longest, cache)
                for c, grade in zip(completions, grades, strict=True)
            ),
        )

    def _seed(self, prompt: Prompt) -> int | None:
        """Seeds of different prompts, versions and samples never meet: sample i uses seed + i."""
        if not self.config.rollout.seeded:
            return None
        spread = 1 << 12
        return ((self.config.run.seed * 1_000_003 + self.weight_version) * 1_000_003 + prompt.position) % (1 << 48) * spread
