"""What ranks do in tests/invariance/test_gpu_path_state.py, with TransformerEngine's stand-in
(support/standin.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_dapo import checkpoint
from megatron_dapo.policy.model import unwrapped
from megatron_dapo.policy.offload import to_device, to_host
from megatron_dapo.policy.optimizer import optimizer_parts
from megatron_dapo.sync.sources import LocalWeights, holdings
from support.cases import PolicyRun, plan
from support.jobs_policy import export, open_policy, part_of
from support.jobs_standin import digest
from support.samples import make_samples


def keep_and_move(runs: Sequence[PolicyRun], folder: str) -> dict[str, Any]:
    """Of each run, through TransformerEngine's stand-in: what is exported and pushed, and one update later,
    how digests and the next update compare after the optimizer's state was away, after a checkpoint was
    loaded, and after it was loaded by the other kind of layers, both ways.
    """
    reports: dict[str, Any] = {}
    for run in runs:
        run_dirs = {kind: Path(folder) / f"{run.name}-{kind}" for kind in ("te", "local")}
        local = replace(run, overrides=[*run.overrides, "policy.layers=local"])
        with open_policy(run, f"{folder}/{run.name}.store") as policy:
            if policy is None:
                continue
            found: dict[str, Any] = {"layers": _layers(policy), "not_held": _not_held(policy)}
            export(policy, run_dirs["te"] / "export")
            policy.update(_batch(policy), 0)
            found["digests"] = [digest(policy), *_away_and_loaded(policy, run_dirs["te"])]
            found["weights"] = [_pieces(policy)]
            found["next"] = [_next(policy, run_dirs["te"] / "after")]
            found["digests_after"] = [digest(policy)]
        for name, run_again, source in (
            ("again", run, run_dirs["te"]),
            ("local", local, run_dirs["te"]),
            ("back", run, run_dirs["local"]),
        ):
            with open_policy(run_again, f"{folder}/{run.name}-{name}.store") as policy:
                _load(policy, source)
                found["weights"].append(_pieces(policy))
                if name == "local":
                    found["local_layers"] = _layers(policy)
                    _save(policy, run_dirs["local"])
                found["next"].append(_next(policy, Path(folder) / f"{run.name}-{name}" / "after"))
                if name == "again":
                    found["digests_after"].append(digest(policy))
        reports[run.name] = found
    return reports


def _layers(policy: Any) -> str:
    """The package of Megatron's that the first layer's linear layers are from."""
    decoder = unwrapped(policy.chunks[0]).decoder
    return type(decoder.layers[0].self_attention.linear_qkv).__module__


def _not_held(policy: Any) -> list[str]:
    """Hugging Face tensors of which this rank does not hold, bit for bit, what a push takes from it."""
    weights, source = LocalWeights(policy.held_shards()), load_file(policy.folder / "model.safetensors")
    wrong = []
    for name, parts in holdings(policy.spec, policy.session.layout).items():
        for part in parts:
            if policy.session.rank in part.ranks:
                box = tuple(slice(at, at + n) for at, n in zip(part.box.start, part.box.size, strict=True))
                view = weights.view(name, part.box.start, part.box.size)
                wrong += [] if torch.equal(view, source[name][box]) else [name]
    return wrong


def _pieces(policy: Any) -> dict[str, str]:
    """Digest of each part of a Hugging Face tensor that this rank holds, whatever its layers call it."""
    return {
        f"{s.hf}[{s.hf_start}+{s.size}]": hashlib.sha256(
            shard.tensor.detach().narrow(s.dim, s.start, s.size).contiguous().numpy().tobytes()
        ).hexdigest()
        for shard in policy.held_shards()
        for s in shard.slices
    }


def _away_and_loaded(policy: Any, run_dir: Path) -> list[str]:
    """Digests after the optimizer's state was away, and after all of it was zero and loaded again."""
    to_host(policy)
    to_device(policy)
    digests = [digest(policy)]
    _save(policy, run_dir)
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.zero_()
    for inner in (part.optimizer for part in optimizer_parts(policy.optimizer)):
        for state in inner.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
    _load(policy, run_dir)
    return [*digests, digest(policy)]


def _save(policy: Any, run_dir: Path) -> None:
    state = checkpoint.RunState(step=1, rollouts={}) if policy.session.rank == 0 else None
    checkpoint.save(run_dir, policy, state, keep=1)


def _load(policy: Any, run_dir: Path) -> None:
    newest = checkpoint.find(run_dir, "auto")
    assert newest is not None
    checkpoint.load(newest, policy)


def _batch(policy: Any) -> Any:
    whole = plan(make_samples(), policy.session.layout, num_updates=2, budget="half")
    return part_of(policy, whole)


def _next(policy: Any, folder: Path) -> list[float]:
    """Loss and gradient norm of the second update; the weights after it are exported."""
    result = policy.update(_batch(policy), 1)
    export(policy, folder)
    return [result.loss, result.grad_norm]
