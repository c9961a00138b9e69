"""Updates on the groups that a run has saved, packed and padded, on the run's own ranks and layout.

python -m benchmarks.updates CONFIG.yaml STEP OUT.json     on each rank, started by `measure`
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch.distributed as dist

from benchmarks.padding import padded_batch
from benchmarks.runs import quiet
from megatron_dapo.config import RunConfig
from megatron_dapo.report.rollouts import load_groups, rollout_path
from megatron_dapo.train import prepare_device, start_ranks

REPEATS = 2


def measure(config: RunConfig, step: int) -> dict[str, float]:
    """Median seconds of an update on the groups of `step`: `packed` as the run does it, and `padded`."""
    out = Path(config.run.dir) / "updates.json"
    file = Path(config.run.dir) / "config.yaml"
    with quiet():
        status = start_ranks(config, ["-m", "benchmarks.updates", str(file), str(step), str(out)])
    if status != 0:
        raise SystemExit(status)
    return json.loads(out.read_text())


def main(file: str, step: str, out: str) -> None:
    """One rank."""
    import warnings

    warnings.filterwarnings("ignore")
    from megatron_dapo.batching.step_batch import make_batch
    from megatron_dapo.objectives import make_objective
    from megatron_dapo.policy import session as session_file
    from megatron_dapo.policy.backend import backend_of
    from megatron_dapo.policy.step import Policy

    config = RunConfig.load(file, [])
    session = session_file.start(config.layout.to_layout(), backend_of(prepare_device(config)))
    objective = make_objective(config.objective, max_age=config.sampling.max_age)
    policy = Policy(config, session, objective)
    groups, _ = load_groups(rollout_path(config.run.dir, int(step)))
    prompts = [len(group.prompt.tokens) for group in groups for _ in group.completions]
    responses = [len(completion.tokens) for group in groups for completion in group.completions]
    batches = {
        "packed": make_batch(groups, config, policy.spec, objective, version=int(step) - 1),
        "padded": padded_batch(
            [prompt + response for prompt, response in zip(prompts, responses, strict=True)],
            config.batch.max_tokens,
            random.Random(0),
            prompts=prompts,
            ranks=session.layout.dp,
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for repeat in range(REPEATS + 1):
        for name, batch in batches.items():
            part = batch.part(session.dp_rank)
            dist.barrier(group=session.control)
            began = time.perf_counter()
            policy.update(part, 0)
            if repeat > 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    if session.rank == 0:
        medians = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
        padded_tokens = sum(batches["padded"].lengths)
        Path(out).write_text(json.dumps(medians | {"padded_tokens": padded_tokens}))
    session_file.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
