"""What ranks do in the tests of the export (support/ranks.py starts them), with made-up weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.sync.export import export
from megatron_dapo.weights import hf
from megatron_dapo.weights.slices import Shard
from support.weights import make_shards, make_weights, small_model


def start() -> tuple[int, Any]:
    """This rank and a gloo group of all ranks."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.group.WORLD


def shards_of_rank(model: ModelSpec, dtype: str, tp: int, pp: int, seed: int = 0) -> list[Shard]:
    """Nothing on ranks beyond tp x pp, as on the second data-parallel replica of a policy."""
    rank = dist.get_rank()
    if rank >= tp * pp:
        return []
    return make_shards(model, make_weights(model, dtype, seed), rank=rank, tp=tp, pp=pp)


def write_checkpoints(cases: list[dict[str, Any]], source: str) -> None:
    """Export the made-up weights of each case: folder, changes of the model, dtype, tp, pp, chunk_bytes."""
    rank, control = start()
    for case in cases:
        model = small_model(**case["changes"])
        shards = shards_of_rank(model, case["dtype"], case["tp"], case["pp"])
        export(
            shards,
            model,
            case["dtype"],
            rank,
            control,
            Path(case["folder"]),
            Path(source),
            chunk_bytes=case["chunk_bytes"],
        )


def fail_to_export(folder: str, source: str) -> dict[str, Any]:
    """What each rank raises when rank 0 cannot write or makes a mistake, or when a shard is missing."""
    rank, control = start()
    model = small_model()
    shards = shards_of_rank(model, "fp32", tp=2, pp=1)

    def attempt(target: Path, shards: list[Shard]) -> str:
        try:
            export(shards, model, "fp32", rank, control, target, Path(source), chunk_bytes=300)
        except Exception as error:
            user = "UserError " if isinstance(error, UserError) else ""
            return f"{user}{type(error).__name__}: {error}"
        return "done"

    here = Path(folder)
    if rank == 0:
        (here / "file").touch()
    found = {"no folder": attempt(here / "file" / "hf", shards)}
    with failing_at_second_file(OSError(28, "No space left on device")):
        found["disk full"] = attempt(here / "hf", shards)
    with failing_at_second_file(KeyError("mistake")):
        found["mistake"] = attempt(here / "hf", shards)
    found["a shard missing"] = attempt(here / "hf", shards[: len(shards) - rank])
    found["before"] = str(sorted(path.name for path in here.glob("hf*")))
    found["at last"] = attempt(here / "hf", shards)
    return found


@contextmanager
def failing_at_second_file(error: Exception) -> Iterator[None]:
    write = hf.write_shard

    def broken(folder: Path, number: int, tensors: Any) -> str:
        if number == 2:
            raise error
        return write(folder, number, tensors)

    hf.write_shard = broken
    try:
        yield
    finally:
        hf.write_shard = write


def peak_of_export(folder: str, source: str, chunk_bytes: int) -> dict[str, int]:
    """Bytes by which resident memory grew at most during an export, and the size of the whole checkpoint.

    All weights lie on rank 1, so that rank 0 receives everything. A first export loads all code.
    """
    rank, control = start()
    model = small_model(
        num_layers=8,
        hidden_size=512,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        ffn_size=1024,
        vocab_size=2048,
    )
    weights = make_weights(model, "fp32")
    total = sum(tensor.nbytes for tensor in weights.values())
    shards = make_shards(model, weights, rank=0, tp=1, pp=1) if rank == 1 else []
    del weights
    for _ in range(2):
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        export(shards, model, "fp32", rank, control, Path(folder), Path(source), chunk_bytes=chunk_bytes)
    return {"grown": resident("VmHWM") - before, "total": total}


def resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", text)
    assert match
    return int(match.group(1)) * 1024
