"""What ranks do in the tests of the policy (ranks.py starts them), and the samples they do it on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.algo.packing import pack
from megatron_dapo.layout import Layout
from megatron_dapo.report.metrics import flatten
from megatron_dapo.types import Batch, Sample

COMMON = ("model.dtype=fp32", "batch.max_tokens=20000")
LAYOUTS: dict[str, tuple[int, list[str]]] = {  # name -> ranks, overrides
    "tp1": (1, []),
    "tp2": (2, ["layout.tensor_parallel=2"]),
    "tp2_sp": (2, ["layout.tensor_parallel=2", "layout.sequence_parallel=true"]),
    "pp2": (2, ["layout.pipeline_parallel=2"]),
    "dp2": (2, ["layout.data_parallel=2"]),
    "dp2_offload": (2, ["layout.data_parallel=2", "model.dtype=bf16", "optimizer.cpu_offload=0.5"]),
    "tp2_pp2": (4, ["layout.tensor_parallel=2", "layout.pipeline_parallel=2"]),
    "ep2": (2, ["layout.data_parallel=2", "layout.expert_parallel=2"]),
    "tp2_sp_ep2": (2, ["layout.tensor_parallel=2", "layout.sequence_parallel=true", "layout.expert_parallel=2"]),
    "tp2_sp_etp2": (2, ["layout.tensor_parallel=2", "layout.sequence_parallel=true", "layout.expert_tensor_parallel=2"]),
    "tp2_sp_ep2_dp2": (
        4,
        ["layout.tensor_parallel=2", "layout.sequence_parallel=true", "layout.expert_parallel=2", "layout.data_parallel=2"],
    ),
    "tp2_sp_ep2_etp2_dp2": (
        4,
        [
            "layout.tensor_parallel=2",
            "layout.sequence_parallel=true",
            "layout.expert_parallel=2",
            "layout.expert_tensor_parallel=2",
            "layout.data_parallel=2",
        ],
    ),
    "ep2_etp2_dp4": (4, ["layout.data_parallel=4", "layout.expert_parallel=2", "layout.expert_tensor_parallel=2"]),
    "tp2_sp_ep2_pp2": (
        4,
        [
            "layout.tensor_parallel=2",
            "layout.sequence_parallel=true",
            "layout.expert_parallel=2",
            "layout.pipeline_parallel=2",
        ],
    ),
    "pp2_ep2_cp2": (4, ["layout.pipeline_parallel=2", "layout.expert_parallel=2", "layout.context_parallel=2"]),
    "cp2": (2, ["layout.context_parallel=2"]),
    "tp2_sp_pp2_vpp2": (
        4,
        [
            "layout.tensor_parallel=2",
            "layout.sequence_parallel=true",
            "layout.pipeline_parallel=2",
            "layout.virtual_pipeline_parallel=2",
        ],
    ),
    "pp2_vpp2": (2, ["layout.pipeline_parallel=2", "layout.virtual_pipeline_parallel=2"]),
    "tp2_sp_pp2": (4, ["layout.tensor_parallel=2", "layout.sequence_parallel=true", "layout.pipeline_parallel=2"]),
    "tp2_cp2": (4, ["layout.tensor_parallel=2", "layout.context_parallel=2"]),
    "tp2_sp_cp2": (4, ["layout.tensor_parallel=2", "layout.sequence_parallel=true", "layout.context_parallel=2"]),
    "dp2_cp2": (4, ["layout.data_parallel=2", "layout.context_parallel=2"]),
    "pp2_vpp2_cp2_dp2": (
        8,
        [
            "layout.pipeline_parallel=2",
            "layout.virtual_pipeline_parallel=2",
            "layout.context_parallel=2",
            "layout.data_parallel=2",
        ],
    ),
    "tp2_pp2_dp2": (8, ["layout.tensor_parallel=2", "layout.pipeline_parallel=2", "layout.data_parallel=2"]),
}


def make_samples(num: int = 12, *, seed: int = 0, vocab: int = 100, longest: int = 70) -> list[Sample]:
    """Samples of very unequal lengths; the fourth is masked out of the loss whole, as overlong filtering does."""
    draw = random.Random(seed)
    samples = []
    for i in range(num):
        prompt, response = draw.randint(2, 12), 1 if i == 1 else longest if i == 2 else draw.randint(1, longest)
        samples.append(
            Sample(
                tokens=tuple(draw.randrange(3, vocab) for _ in range(prompt + response)),
                response_mask=(False,) * prompt + (i != 3,) * response,
                rollout_logprobs=(0.0,) * prompt + tuple(-4 + draw.random() for _ in range(response)),
                advantage=draw.gauss(0.4, 1.0),
                weight_version=0,
                prompt_position=i // 4,
            )
        )
    return samples


@contextlib.contextmanager
def open_policy(layout: str, model: str, store: str, overrides: Sequence[str] = ()) -> Iterator[Any]:
    """A Policy on the first ranks of this launch, or None on a rank the layout does not use. `store`: a file, new each time."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from megatron_dapo.config import RunConfig
    from megatron_dapo.policy import model as model_file
    from megatron_dapo.policy import parallel
    from megatron_dapo.policy.step import Policy

    torch.set_num_threads(1)
    world, sizes = LAYOUTS[layout]
    rank = int(os.environ["RANK"])
    if rank >= world:
        yield None
        return
    # small gradient buckets, so that overlapped communication really comes in parts
    model_file.DistributedDataParallelConfig = functools.partial(DistributedDataParallelConfig, bucket_size=20_000)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        yield Policy(RunConfig.load(None, [f"model.path={model}", *COMMON, *sizes, *overrides]), on_cpu=True)
        dist.barrier()
    finally:
        parallel.stop()


def plan(samples: Sequence[Sample], layout: Layout, *, num_updates: int, budget: str) -> Batch:
    """`budget`: 'one' sample per micro-batch, 'half' of the tokens of a rank's share, or 'all' of them in as few as there may be."""
    total = sum(len(s.tokens) for s in samples) / num_updates / layout.dp
    half = max(int(0.6 * total), max(len(s.tokens) for s in samples))
    return pack(
        samples,
        dp=layout.dp,
        num_updates=num_updates,
        max_tokens=half if budget == "half" else 20000,
        min_micro_batches=len(samples) if budget == "one" else 1,
        multiple=layout.micro_batch_multiple,
    )


def measure(runs: list[dict[str, Any]], old_logprobs: dict[str, list[float]], folder: str) -> dict[str, Any]:
    """Three updates of every run: what they report, and, exported to `name` and `name-gradients`, the weights after them and the
    gradients of the first. A run: name, layout, model (folder), num_updates, budget, overrides."""
    from megatron_dapo.bridge.transfer import WeightBuckets

    samples, found = make_samples(), {}
    for run in runs:
        with open_policy(run["layout"], run["model"], f"{folder}/{run['name']}.store", run["overrides"]) as policy:
            if policy is None:
                continue
            batch = plan(samples, policy.place.layout, num_updates=run["num_updates"], budget=run["budget"])
            old_T = torch.tensor(old_logprobs[run["model"]])
            results, gradients = [], {}
            for k in range(3):
                results.append(policy.update(batch, k % run["num_updates"], old_T))
                gradients = gradients or whole_gradients(policy)
            buckets = WeightBuckets(policy.chunks, policy.hf, policy.place, policy.config.model.dtype)
            buckets.export(Path(folder) / run["name"], policy.folder)
            with torch.no_grad():
                for parameter, gradient in gradients.items():
                    parameter.copy_(gradient)
                buckets.export(Path(folder) / f"{run['name']}-gradients", policy.folder)
            found[run["name"]] = [
                {"loss": r.loss, "grad_norm": r.grad_norm, "micro_batches": r.num_micro_batches, **flatten(r.metrics)}
                for r in results
            ]
    return found


def whole_gradients(policy: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """This rank's gradients, clipped, as the last update used them. The distributed optimizer leaves each rank its part of them."""
    for chunk in policy.chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            if policy.config.optimizer.distributed:
                for bucket in buffer.buckets:
                    group = buffer.data_parallel_group
                    part = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, part, group=group)
    return {p: p.main_grad.clone() for chunk in policy.chunks for p in chunk.parameters()}


def logprobs_and_export(runs: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """`Policy.logprobs` of the samples, then the untouched weights exported once per bucket size."""
    from megatron_dapo.bridge.transfer import WeightBuckets

    samples, found = make_samples(), {}
    for run in runs:
        with open_policy(run["layout"], run["model"], f"{folder}/{run['name']}.store", run.get("overrides", [])) as policy:
            if policy is None:
                continue
            found[run["name"]] = policy.logprobs(plan(samples, policy.place.layout, num_updates=2, budget="half")).tolist()
            for size in run["bucket_bytes"]:
                buckets = WeightBuckets(policy.chunks, policy.hf, policy.place, "fp32", bucket_bytes=size)
                buckets.export(Path(folder) / f"{run['name']}-{size}", policy.folder)
    return found


def _state(policy: Any) -> str:
    """Digest of this rank's parameters and of all of its optimizer state."""
    import hashlib

    tensors = list(itertools.chain(*(chunk.parameters() for chunk in policy.chunks)))
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                tensors += [parameter, *(torch.as_tensor(state[name]) for name in ("step", "exp_avg", "exp_avg_sq"))]
                tensors += [state["master_param"]] if "master_param" in state else []
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _update(policy: Any, batch: Batch, number: int) -> dict[str, Any]:
    result = policy.update(batch, number % 2)
    return {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr, "state": _state(policy)}


OPTIMIZER = ("optimizer.lr=1e-3", "optimizer.warmup_updates=3", "optimizer.decay=cosine", "optimizer.decay_updates=9")


def train_and_save(layouts: list[str], model: str, folder: str) -> dict[str, Any]:
    """Four updates; saves after the first and second (keeping two), then fails to save, on rank 1 alone, after the third."""
    from megatron_dapo import checkpoint

    found: dict[str, Any] = {}
    for layout in layouts:
        run_dir = Path(folder) / layout
        with open_policy(layout, model, f"{folder}/save-{layout}.store", OPTIMIZER) as policy:
            if policy is None:
                continue
            batch = plan(make_samples(), policy.place.layout, num_updates=2, budget="half")
            updates = []
            for number in range(4):
                updates.append(_update(policy, batch, number))
                if number < 2:
                    checkpoint.save(run_dir, policy, _run_state(policy, number + 1), keep=2)
            parts = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
            on_host = sum(len(getattr(part.optimizer, "gpu_params_map_cpu_copy", ())) for part in parts)
            shards = sum(len(part.get_parameters()) for part in parts)
            found[layout] = {"updates": updates, "failure": _fail_to_save(policy, run_dir), "on_host": [on_host, shards]}
    return found


def _run_state(policy: Any, step: int) -> Any:
    from megatron_dapo.checkpoint import RunState

    return RunState(step=step, prompts={"cursor": 7 * step}, collector={"carried": [step]}) if policy.place.rank == 0 else None


def _fail_to_save(policy: Any, run_dir: Path) -> str | None:
    """The disk is full for rank 1 alone: the message of SaveFailed on this rank."""
    import resource

    from megatron_dapo import checkpoint

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if policy.place.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        checkpoint.save(run_dir, policy, _run_state(policy, 3), keep=1)
    except checkpoint.SaveFailed as failure:
        return str(failure)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return None


def resume(layouts: list[str], model: str, folder: str, reshard: dict[str, str]) -> dict[str, Any]:
    """Load the newest checkpoint of each layout, update twice, save again keeping one. `reshard`: new layout -> saved one."""
    from megatron_dapo import checkpoint

    found: dict[str, Any] = {}
    for name in (*reshard, *layouts):
        run_dir = Path(folder) / reshard.get(name, name)
        with open_policy(name, model, f"{folder}/resume-{name}.store", OPTIMIZER) as policy:
            if policy is None:
                continue
            newest = checkpoint.find(run_dir, "auto")
            assert newest is not None
            state = checkpoint.load(newest, policy)
            norms = list(policy.guard.norms)
            batch = plan(make_samples(), policy.place.layout, num_updates=2, budget="half")
            found[name] = {
                "folder": newest.name,
                "state": [state.step, state.prompts, state.collector, policy.num_updates],
                "norms": norms,
                "updates": [_update(policy, batch, number) for number in (2, 3)],
            }
            if name not in reshard:
                checkpoint.save(run_dir, policy, _run_state(policy, 4), keep=1)
    return found
