"""A run that is killed and resumed is, bit for bit, the run that was not; and a save that fails costs
nothing.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from support.cases import LAYOUTS
from support.jobs_checkpoint import checkpoint_run
from support.models import make_tiny_model
from support.ranks import run_ranks
from torch.distributed.checkpoint import FileSystemReader

from megatron_dapo import checkpoint
from megatron_dapo.config import RunConfig
from megatron_dapo.convert.disk_keys import targets
from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import read_model

RUNS = ["dp2", "tp2_pp2", "pp2_vpp2", "dp2_offload"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, what each rank of the first launch reported, what was on disk after it, and what each rank of
    a second one reported).
    """
    folder = tmp_path_factory.mktemp("runs")
    model = str(
        make_tiny_model(folder / "model", tied=True, layers=4, heads=4, kv_heads=2, hidden=64, ffn=64)
    )
    saved = run_ranks(
        "support.jobs_checkpoint:train_and_save",
        4,
        runs=[checkpoint_run(name, model) for name in RUNS],
        folder=str(folder),
        timeout_s=280,
    )
    for name in RUNS:  # what a crash leaves behind
        checkpoints = folder / name / "checkpoints"
        (checkpoints / "step_000009").mkdir()
        (checkpoints / "step_000008.tmp").mkdir()
        (checkpoints / "step_000008.tmp" / "run.pt").write_bytes(b"")
    listed = {name: sorted(p.name for p in (folder / name / "checkpoints").iterdir()) for name in RUNS}
    resumed = run_ranks(
        "support.jobs_checkpoint:resume",
        4,
        runs=[checkpoint_run(name, model) for name in ("tp1", *RUNS)],
        folder=str(folder),
        saved_by={"tp1": "dp2"},
        timeout_s=280,
    )
    return folder, saved, listed, resumed


def world_of(name: str) -> int:
    return LAYOUTS[name.removesuffix("_offload")].world_size


@pytest.mark.parametrize("name", RUNS)
def test_resuming_repeats_the_unkilled_run_bit_for_bit(runs, name):
    _, saved, _, resumed = runs
    for rank in range(world_of(name)):
        unkilled = saved[rank][name]["updates"]
        assert (
            resumed[rank][name]["updates"] == unkilled[2:]
        )  # loss, gradient norm, lr, digest of weights and optimizer
        assert len({update["state"] for update in unkilled}) == 4  # the digest does see an update
        assert len({update["lr"] for update in unkilled}) == 4


@pytest.mark.parametrize("name", RUNS)
def test_a_part_of_an_offloaded_optimizer_is_on_the_host(runs, name):
    """Otherwise it would be no wonder that offloading changes no bit (tests/invariance/test_layouts.py)."""
    for rank in range(world_of(name)):
        on_host, shards = runs[1][rank][name]["on_host"]
        assert 0 < on_host < shards if name == "dp2_offload" else on_host == 0 < shards


@pytest.mark.parametrize("name", RUNS)
def test_the_guard_remembers_the_gradient_norms(runs, name):
    _, saved, _, resumed = runs
    for rank in range(world_of(name)):
        assert resumed[rank][name]["norms"] == [
            update["grad_norm"] for update in saved[rank][name]["updates"][:2]
        ]


@pytest.mark.parametrize("name", RUNS)
def test_the_step_reaches_every_rank_and_what_is_carried_rank_0_alone(runs, name):
    for rank in range(world_of(name)):
        found = runs[3][rank][name]
        assert found["folder"] == "step_000002"
        assert found["state"] == [2, {"cursor": 14} if rank == 0 else None, 2]


def test_a_checkpoint_loads_at_another_data_parallel_size(runs):
    _, saved, _, resumed = runs
    for mine, original in zip(resumed[0]["tp1"]["updates"], saved[0]["dp2"]["updates"][2:], strict=True):
        assert mine["loss"] == pytest.approx(original["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(original["grad_norm"], rel=1e-5)
        assert mine["lr"] == original["lr"]


@pytest.mark.parametrize("name", RUNS)
def test_a_failing_save_raises_everywhere_and_leaves_the_old_ones(runs, name):
    _, saved, listed, _ = runs
    for rank in range(world_of(name)):
        message = saved[rank][name]["failure"]
        assert (
            message is not None
            and "step_000003" in message
            and "rank 1" in message
            and "previous checkpoint is untouched" in message
        )
    assert listed[name] == ["step_000001", "step_000002", "step_000008.tmp", "step_000009"]


@pytest.mark.parametrize("name", RUNS)
def test_only_the_newest_are_kept_and_only_whole_ones_count(runs, name):
    folder = runs[0] / name
    left = sorted(
        p.name for p in (folder / "checkpoints").iterdir() if (p / "run.pt").is_file() and p.suffix == ""
    )
    assert left == ["step_000004"]  # saved with keep=1, after resuming
    assert (folder / "checkpoints" / "step_000009").is_dir()  # incomplete: neither counted nor touched


def whole(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step_{step:06d}" / "run.pt").write_bytes(b"")


def test_find(tmp_path):
    assert checkpoint.find(tmp_path, "auto") is None
    whole(tmp_path, 2, 10, 9)
    (tmp_path / "checkpoints" / "step_000011").mkdir()
    (tmp_path / "checkpoints" / "step_000012.tmp").mkdir()
    (tmp_path / "checkpoints" / "step_000012.tmp" / "run.pt").write_bytes(b"")
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "checkpoints" / "step_000010"
    assert checkpoint.find(tmp_path, "never") is None
    chosen = tmp_path / "checkpoints" / "step_000002"
    assert checkpoint.find(tmp_path, str(chosen)) == chosen


def test_find_refuses_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(
        UserError, match=r"checkpoint\.resume=.*step_000011 is no complete checkpoint.*'auto', 'never'"
    ):
        checkpoint.find(tmp_path, str(tmp_path / "step_000011"))


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(tmp_path):
    torch.save({"state": "as it was", "num_updates": 3}, tmp_path / "run.pt")
    with pytest.raises(UserError, match=rf"checkpoint\.resume: {tmp_path} .* another version.*run\.dir"):
        checkpoint.load(tmp_path, policy=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("recipe", "device", "saved", "are_read"),
    [
        (None, "gpu", {"fp8_scales": None}, False),  # of whichever layers: there is nothing in them
        ("blockwise", "gpu", {"fp8_scales": None}, False),
        ("delayed", "gpu", {"fp8_scales": "gpu"}, True),
        ("delayed", "cpu", {"fp8_scales": "cpu"}, True),
        ("delayed", "gpu", {"fp8_scales": "cpu"}, False),  # scales of the emulation
        ("delayed", "cpu", {"fp8_scales": None}, False),  # the run had no FP8 until now
        ("delayed", "cpu", {}, True),  # nobody had noted it yet
    ],
)
def test_extra_states_of_layers_are_read_where_they_hold_what_these_layers_saved(
    monkeypatch, tmp_path, recipe, device, saved, are_read
):
    class Asked(Exception):
        pass

    def load(state, folder):
        raise Asked(state["model"]["x._extra_state"])

    entry = ShardedObject("x._extra_state", "own", (1,), (0,))
    monkeypatch.setattr(checkpoint, "_sharded_state", lambda policy: {"model": {"x._extra_state": entry}})
    monkeypatch.setattr(checkpoint, "_damage", lambda folder: None)
    monkeypatch.setattr(checkpoint.dist_checkpointing, "load", load)
    torch.save({"format": checkpoint.FORMAT} | saved, tmp_path / "run.pt")
    session = SimpleNamespace(
        rank=0, channel=SimpleNamespace(share=lambda x: x), backend=SimpleNamespace(name=device)
    )
    config = RunConfig.load(None, ["model.path=m", *([f"policy.fp8.recipe={recipe}"] if recipe else [])])
    policy = SimpleNamespace(session=session, config=config, value_model=None, reference=None)
    with pytest.raises(Asked) as asked:
        checkpoint.load(tmp_path, policy)  # type: ignore[arg-type]
    (found,) = asked.value.args
    assert found is entry if are_read else found.unwrap() == "own"


def test_checkpoints_of_an_earlier_run_are_set_aside(tmp_path):
    """A new run in an old folder must neither resume from nor be crowded out by later steps that are not its
    own.
    """
    for step in (95, 100):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_{step:06d}" / "run.pt").touch()
    assert checkpoint.set_aside(tmp_path, 100) is None  # resumed from the newest: they are its own
    assert checkpoint.set_aside(tmp_path, 0) == tmp_path / "checkpoints.1"
    assert checkpoint.find(tmp_path, "auto") is None
    assert sorted(p.name for p in (tmp_path / "checkpoints.1").iterdir()) == ["step_000095", "step_000100"]
    assert checkpoint.set_aside(tmp_path, 0) is None


@pytest.fixture
def keeper(monkeypatch, tmp_path):
    """keeper(*overrides) -> what a Keeper does after each step, as words, when asked with `after(step)`; its
    writer says "poll" and "finish", a save "save 4", an export "export 4".
    """
    done: list[str] = []

    class Writer:
        def __init__(self, session, *, in_background):
            done.append(f"in_background={in_background}")

        def poll(self):
            done.append("poll")

        def finish(self):
            done.append("finish")

    def export(folder, policy, step):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        done.append(f"export {step}")
        return folder

    monkeypatch.setattr(checkpoint, "CheckpointWriter", Writer)
    monkeypatch.setattr(checkpoint, "save", lambda d, p, state, *others: done.append(f"save {state.step}"))
    monkeypatch.setattr(checkpoint, "export_hf", export)
    policy = SimpleNamespace(session=SimpleNamespace(rank=0))

    def make(*overrides: str, step: int = 0):
        config = RunConfig.load(None, ["model.path=m", f"run.dir={tmp_path}", *overrides])
        found = checkpoint.Keeper(config, None, step)  # type: ignore[arg-type]

        def after(step: int, *, last: bool = False) -> list[str]:
            done.clear()
            state = lambda: checkpoint.RunState(step=step, rollouts={})  # noqa: E731
            if last:
                found.save(policy, step, state, wait=True)  # type: ignore[arg-type]
            else:
                found.keep(policy, step, state, lambda text: None)  # type: ignore[arg-type]
            return list(done)

        return after

    return make


def test_checkpoints_and_exports_come_when_they_are_due(keeper):
    after = keeper("checkpoint.every_steps=2", "checkpoint.export_every=3")
    assert [after(step) for step in range(7)] == [
        ["poll"],  # a fresh run counts as saved
        ["poll"],
        ["poll", "save 2"],
        ["poll", "export 3"],
        ["poll", "save 4"],
        ["poll"],
        ["poll", "save 6", "export 6"],
    ]
    assert after(6, last=True) == ["finish"]  # saved, but perhaps not written yet
    assert after(7, last=True) == ["save 7", "finish"]


def test_the_step_that_a_run_resumes_from_is_not_saved_again(keeper):
    after = keeper("checkpoint.every_steps=2", step=4)
    assert after(4) == ["poll"] and after(4, last=True) == ["finish"]


@pytest.mark.parametrize(("keep", "left"), [("1", [3]), ("2", [2, 3]), ("null", [1, 2, 3])])
def test_the_newest_exports_stay(keeper, tmp_path, keep, left):
    after = keeper("checkpoint.export_every=1", f"checkpoint.keep_exports={keep}")
    for step in (1, 2, 3):
        after(step)
    names = sorted(path.name for path in (tmp_path / "exports").iterdir())
    assert names == [f"step_{step:06d}" for step in left]


@pytest.mark.slow
def test_experts_resume_too(tmp_path):
    model = str(
        make_tiny_model(
            tmp_path / "model", arch="qwen3_moe", layers=2, heads=4, kv_heads=2, hidden=64, ffn=64
        )
    )
    experts, half = (checkpoint_run(name, model) for name in ("tp2_sp_ep2_dp2", "tp2_sp_ep2"))
    folder = str(tmp_path)
    saved = run_ranks(
        "support.jobs_checkpoint:train_and_save", 4, runs=[experts], folder=folder, timeout_s=280
    )
    newest = checkpoint.find(tmp_path / experts.name, "auto")
    assert newest is not None
    keys = FileSystemReader(newest).read_metadata().state_dict_metadata.keys()
    for target in targets(read_model(Path(model))):  # the names that TransformerEngine's layers ask for
        assert target.keys[0] in keys and f"optimizer.state.exp_avg.{target.keys[0]}" in keys
    resumed = run_ranks(
        "support.jobs_checkpoint:resume",
        4,
        runs=[half, experts],
        folder=folder,
        saved_by={half.name: experts.name},  # half the data-parallel ranks
        timeout_s=280,
    )
    for rank in range(4):
        unkilled = saved[rank]["tp2_sp_ep2_dp2"]["updates"]
        assert resumed[rank]["tp2_sp_ep2_dp2"]["updates"] == unkilled[2:]
        assert len({update["state"] for update in unkilled}) == 4
    for mine, original in zip(
        resumed[0]["tp2_sp_ep2"]["updates"], saved[0]["tp2_sp_ep2_dp2"]["updates"][2:], strict=True
    ):
        assert mine["loss"] == pytest.approx(original["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(original["grad_norm"], rel=1e-5)
