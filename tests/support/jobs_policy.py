"""What ranks do in the tests of the policy: build one, update it, measure log-probabilities, export."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.config import RunConfig
from megatron_dapo.metrics import flatten
from megatron_dapo.objectives import make_objective
from megatron_dapo.objectives.base import Objective
from megatron_dapo.types import Stream, UpdateResult
from support.cases import LAYOUTS, PolicyRun, plan
from support.samples import make_samples


@contextlib.contextmanager
def open_session(layout: str, store: str) -> Iterator[Any]:
    """A Session on the first ranks of this launch, or None on a rank the layout does not use. `store`: a
    file, new each time.
    """
    from megatron.core.distributed import DistributedDataParallelConfig

    from megatron_dapo.policy import model as model_file
    from megatron_dapo.policy import session as session_file
    from megatron_dapo.policy.backend import CPU

    torch.set_num_threads(1)
    sizes = LAYOUTS[layout]
    rank = int(os.environ["RANK"])
    if rank >= sizes.world_size:
        yield None
        return
    # small gradient buckets, so that overlapped communication really comes in parts
    model_file.DistributedDataParallelConfig = functools.partial(
        DistributedDataParallelConfig, bucket_size=20_000
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=sizes.world_size)
    try:
        yield session_file.start(sizes, CPU)
        dist.barrier()
    finally:
        session_file.stop()


@contextlib.contextmanager
def open_policy(run: PolicyRun, store: str, objective: Objective | None = None) -> Iterator[Any]:
    """The run's Policy (its configuration's objective unless another is given), or None on a rank without
    one.
    """
    from megatron_dapo.policy.step import Policy

    with open_session(run.layout, store) as session:
        if session is None:
            yield None
            return
        config = RunConfig.load(None, run.arguments())
        yield Policy(config, session, objective or make_objective(config.objective))


def part_of(policy: Any, batch: Any) -> Any:
    return batch.part(policy.session.dp_rank)


def described(result: UpdateResult) -> dict[str, Any]:
    """What an update reports, in a form that travels."""
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "micro_batches": result.num_micro_batches,
        **flatten(result.metrics),
    }


def export(policy: Any, folder: Path, chunk_bytes: int = 1 << 30) -> None:
    """The policy's weights as a Hugging Face checkpoint."""
    from megatron_dapo.sync.export import export as export_shards

    export_shards(
        policy.weight_shards(),
        policy.spec,
        policy.config.model.dtype,
        rank=policy.session.rank,
        control=policy.session.control,
        folder=folder,
        source=policy.folder,
        chunk_bytes=chunk_bytes,
    )


def measure(runs: Sequence[PolicyRun], old_logprobs: dict[str, list[float]], folder: str) -> dict[str, Any]:
    """Three updates of every run: what they report, a digest of weights and optimizer state after them
    (`name-state`), and, exported to `name` and `name-gradients`, the weights
    after them and the gradients of the first. `old_logprobs`: by model, of all samples end to end; models
    without them train with those of the policy itself.
    """
    samples, reports = make_samples(), {}
    for run in runs:
        with open_policy(run, f"{folder}/{run.name}.store") as policy:
            if policy is None:
                continue
            whole = plan(
                samples,
                policy.session.layout,
                num_updates=run.num_updates,
                budget=run.budget,
                denominator=policy.objective.denominator,
            )
            if run.model in old_logprobs:
                whole = whole.with_stream(Stream.OLD_LOGPROBS, torch.tensor(old_logprobs[run.model]))
            batch = policy.streams(part_of(policy, whole))
            results, gradients = [], {}
            for k in range(3):
                results.append(policy.update(batch, k % run.num_updates))
                gradients = gradients or whole_gradients(policy)
            export(policy, Path(folder) / run.name)
            reports[f"{run.name}-state"] = digest(policy)
            with torch.no_grad():
                for parameter, gradient in gradients.items():
                    parameter.copy_(gradient)
                export(policy, Path(folder) / f"{run.name}-gradients")
            reports[run.name] = [described(result) for result in results]
    return reports


def whole_gradients(policy: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """This rank's gradients, clipped, as the last update used them. The distributed optimizer leaves each
    rank its part of them.
    """
    for chunk in policy.chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            if policy.config.optimizer.distributed:
                for bucket in buffer.buckets:
                    group = buffer.data_parallel_group
                    part = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, part, group=group)
    return {p: p.main_grad.clone() for chunk in policy.chunks for p in chunk.parameters()}


def logprobs_of_samples(policy: Any, num_updates: int = 2) -> list[float]:
    """`logprobs` of all samples end to end, put together from the parts of the data-parallel ranks: [T]."""
    layout = policy.session.layout
    whole = plan(make_samples(), layout, num_updates=num_updates, budget="half")
    own = policy.logprobs(part_of(policy, whole)).tolist()
    parts: list[Any] = [None] * policy.session.world_size
    dist.all_gather_object(parts, (policy.session.dp_rank, own), group=policy.session.control)
    flat_T = torch.zeros(sum(whole.lengths))
    starts = [0, *itertools.accumulate(whole.lengths)]
    for dp_rank, values in parts:
        mine = sorted(i for m in whole.mini_batches for micro in m.micro_batches[dp_rank] for i in micro)
        index_T = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in mine])
        flat_T[index_T] = torch.tensor(values)
    return flat_T.tolist()


def logprobs_and_export(
    runs: Sequence[PolicyRun], sizes: dict[str, list[int]], folder: str
) -> dict[str, Any]:
    """`Policy.logprobs` of the samples, then the untouched weights exported once per chunk size (`sizes`, by
    run).
    """
    logprobs = {}
    for run in runs:
        with open_policy(run, f"{folder}/{run.name}.store") as policy:
            if policy is None:
                continue
            logprobs[run.name] = logprobs_of_samples(policy)
            for size in sizes[run.name]:
                export(policy, Path(folder) / f"{run.name}-{size}", size)
    return logprobs


def digest(policy: Any) -> str:
    """Of this rank's parameters and of all of its optimizer state."""
    tensors = list(itertools.chain(*(chunk.parameters() for chunk in policy.chunks)))
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                # the fp32 weights that are updated, whether optimizer.cpu_offload keeps them apart or not
                tensors.append(state.get("master_param", parameter))
                tensors += [torch.as_tensor(state[name]) for name in ("step", "exp_avg", "exp_avg_sq")]
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def megatron_version() -> str:
    """Of the megatron-core that ranks import."""
    import megatron.core

    return megatron.core.__version__.split("+")[0]  # newer ones add +<commit>
