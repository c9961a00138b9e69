"""The command line: python -m megatron_dapo.train CONFIG.yaml [section.key=value ...] [--dry-run] [--deep]

Started plainly it checks everything that can be checked cheaply (preflight.py), then starts the ranks on this
host through torchrun's launcher API. Started under torchrun it is one of the ranks.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_dapo import preflight
from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError

_PR_SET_PDEATHSIG = 1
RUN_ID = "megatron_dapo"  # torchrun's name of the groups of ranks that `start_ranks` starts
SETTLE_S = 30.0  # within which the lifeline knows whom rank 0 has lost
LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection timed out",
    "remote process exited",  # NCCL
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_dapo.train", description=__doc__)
    parser.add_argument("config", nargs="?", help="YAML file; without it everything comes from the overrides")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, the layout and the processes, and stop",
    )
    parser.add_argument(
        "--deep", action="store_true", help="check too that the memory of the GPUs suffices, as planned"
    )
    options = parser.parse_intermixed_args(arguments)
    path, overrides = options.config, list(options.overrides)
    if path and "=" in path:
        path, overrides = None, [path, *overrides]
    rank = os.environ.get("RANK")
    try:
        config = RunConfig.load(path, overrides)
        if rank is not None:
            if rank == "0" and os.environ.get("TORCHELASTIC_RUN_ID") != RUN_ID:
                preflight.check(config, deep=options.deep)  # `launch` did not
            return run_rank(config)
        if options.dry_run:
            preflight.check(config, planned=True, deep=options.deep)
            print(describe(config))
            return 0
        return launch(config, deep=options.deep)
    except UserError as error:
        # on several hosts it may be wrong on one of them alone
        if rank in (None, "0") or os.environ.get("LOCAL_RANK") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2


def describe(config: RunConfig) -> str:
    """The resolved configuration, the layout and the processes a run would start."""
    layout, rollout, hosts = config.layout.to_layout(), config.rollout, preflight.num_hosts()
    where = f" on each of {hosts} hosts" if hosts > 1 else ""
    if not rollout.colocated:
        where = " on each host that joins with python -m megatron_dapo.serve"
    return (
        f"{config.dump()}\n"
        f"# layout: {layout.describe()} = {layout.world_size} policy ranks\n"
        f"# processes: {layout.world_size} policy ranks (rank 0 is the controller), {rollout.engines} vLLM "
        f"servers{where} of tensor-parallel "
        f"size {rollout.tensor_parallel}, {config.reward.workers} grading workers\n"
        f"# per step: {config.sampling.prompts_per_step} groups of {config.sampling.samples_per_prompt} "
        f"samples, "
        f"{config.batch.updates_per_step} updates"
    )


def launch(config: RunConfig, *, deep: bool = False) -> int:
    """Check, write `<run.dir>/config.yaml`, start the ranks on this host, wait; returns the exit status.

    SIGTERM and Ctrl-C are passed on once: the ranks then save a checkpoint and end. UserError before that.
    """
    preflight.check(config, deep=deep)
    file = Path(config.run.dir) / "config.yaml"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(config.dump())
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"run.dir={config.run.dir!r} cannot be written ({error}); choose another") from error
    return start_ranks(config, ["-m", "megatron_dapo.train", str(file)])


def start_ranks(config: RunConfig, arguments: list[str]) -> int:
    """Run `python *arguments` on as many ranks as the layout has, on this host, through torchrun's launcher
    API.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks speak for themselves
    world = config.layout.to_layout().world_size
    if preflight.on_cpu(config):
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // world))
        # A thread that spins at a barrier takes a core from the engines.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    else:  # Megatron-Core wants it with tensor parallelism before Blackwell; CUDA reads it when it starts
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    previous = {sign: signal.signal(sign, _pass_on) for sign in (signal.SIGTERM, signal.SIGINT)}
    logs = tempfile.TemporaryDirectory(prefix="dapo_ranks_")  # torchrun's, which would stay behind
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=RUN_ID,
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=logs.name),
        signals_to_handle="SIGQUIT",  # SIGTERM and SIGINT go to `_pass_on`
    )
    try:
        elastic_launch(settings, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"error: rank {rank} ended with exit code {failure.exitcode}; its message is above",
            file=sys.stderr,
        )
        return 1
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)
        logs.cleanup()
    return 0


def run_rank(config: RunConfig) -> int:
    """One rank, inside torchrun's environment. It dies with its parent, and what it forks with it."""
    die_with_parent(os.getppid())
    for sign in (signal.SIGTERM, signal.SIGINT):  # until there is something to save; then the Trainer decides
        signal.signal(sign, _leave_quietly)
    import warnings

    warnings.filterwarnings("ignore", module=r"(torch|megatron|megatron_dapo\.policy\.cpu)\b")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    cpu = prepare_device(config)
    from megatron_dapo.policy import session
    from megatron_dapo.policy.backend import backend_of
    from megatron_dapo.trainer import Trainer

    backend = backend_of(cpu)
    try:
        session.start(config.layout.to_layout(), backend, remedy=how_to_resume(config))
        Trainer(config, backend).run()
    except BaseException as error:  # Megatron's CheckpointException is no Exception
        return end_with(error)
    session.stop()
    return 0


def end_with(error: BaseException) -> int:
    """The exit code of a rank that `error` ends, after whom it concerns has been told.

    Rank 0 prints a user's error for all: its own, and, where another rank alone has one, what that rank says
    on the lifeline. A rank that another one has left lets the lifeline say which. Everything else is raised,
    for its traceback.
    """
    from megatron_dapo.policy import session
    from megatron_dapo.policy.control import RankZeroLost

    rank, left = os.environ["RANK"], isinstance(error, RankZeroLost) or is_lost_peer(error)
    if left and session.settle(SETTLE_S if rank == "0" else SETTLE_S / 10):
        session.leave()
        return 1
    words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    rank_0_knows = session.leave(words)
    if isinstance(error, RankZeroLost):
        speaks = rank == "1"
    else:
        speaks = rank == "0" or (not rank_0_knows and os.environ.get("LOCAL_RANK") == "0")
    if not isinstance(error, UserError) and (speaks or not left):
        raise error
    if speaks:
        print(f"error: {error}", file=sys.stderr)
    return 1


def how_to_resume(config: RunConfig) -> str:
    """The command that goes on from the newest checkpoint."""
    if os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID:
        file = shlex.quote(f"{config.run.dir}/config.yaml")
        return f"resume with: python -m megatron_dapo.train {file} checkpoint.resume=auto"
    return "resume with the same command on every host, with checkpoint.resume=auto"


def _leave_quietly(number: int, frame: Any) -> None:
    """End at a signal, before there is a trainer that could save."""
    if session := sys.modules.get("megatron_dapo.policy.session"):
        session.leave()
    os._exit(0)


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when process `parent` ends, for this process and for every child it forks.

    Megatron forks a writer for each checkpoint; one whose rank was killed would wait for it for ever.
    """
    _die_with(parent)
    forking = {"pid": 0}
    os.register_at_fork(
        before=lambda: forking.update(pid=os.getpid()), after_in_child=lambda: _die_with(forking["pid"])
    )


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def prepare_device(config: RunConfig) -> bool:
    """Give this rank its share of the cores, or its GPU. Returns whether it computes on the CPU."""
    import torch

    cpu = preflight.on_cpu(config)
    if cpu:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return cpu


def is_lost_peer(error: BaseException) -> bool:
    """Whether gloo or NCCL says that another rank is gone. They have several ways to say so."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in LOST_PEER)


def _pass_on(number: int, frame: Any) -> None:
    """Send the signal to the ranks, which are this process's children."""
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
