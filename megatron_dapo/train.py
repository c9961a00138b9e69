"""The command line: python -m megatron_dapo.train CONFIG.yaml [section.key=value ...] [--dry-run]

Started plainly it checks everything that can be checked cheaply, then starts the ranks on this host through torchrun's launcher
API. Started under torchrun it is one of the ranks.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig

_PR_SET_PDEATHSIG = 1
RUN_ID = "megatron_dapo"  # torchrun's name of the groups of ranks that `start_ranks` starts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_dapo.train", description=__doc__)
    parser.add_argument("config", nargs="?", help="YAML file; without it everything comes from the overrides")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration, the layout and the processes, and stop"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        path, overrides = options.config, list(options.overrides)
        if path and "=" in path:
            path, overrides = None, [path, *overrides]
        config = RunConfig.load(path, overrides)
        if "RANK" in os.environ:
            if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_RUN_ID") != RUN_ID:
                check(config)  # `launch` did not
            return run_rank(config)
        if options.dry_run:
            check(config)
            print(describe(config))
            return 0
        return launch(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(config: RunConfig) -> None:
    """Everything that can be wrong about model, layout, data and verifier, before any process starts. ValueError."""
    from megatron_dapo.bridge.hf import read_model, resolve_folder
    from megatron_dapo.data.prompts import load_rows
    from megatron_dapo.policy import fp8_rules
    from megatron_dapo.reward.math import load_verifier
    from megatron_dapo.rollout.launch import checked_port

    model = read_model(resolve_folder(config.model.path))
    config.layout.to_layout().check_model(
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        hidden_size=model.hidden_size,
        ffn_size=model.ffn_size,
        num_experts=model.num_experts,
    )
    per_chunk = model.num_layers // config.layout.to_layout().num_stages
    if config.policy.recompute == "full" and per_chunk % config.policy.recompute_layers:
        raise ValueError(
            f"policy.recompute_layers={config.policy.recompute_layers} does not divide the {per_chunk} layers of a pipeline stage's "
            f"chunk; use one of {[d for d in range(1, per_chunk + 1) if per_chunk % d == 0]}"
        )
    if on_cpu(config):
        for key, value in (
            ("policy.overlap_tensor_parallel", config.policy.overlap_tensor_parallel),
            ("policy.recompute_modules", "moe_act" in config.policy.recompute_modules and config.policy.recompute_modules),
        ):
            if value:
                raise ValueError(f"{key}={value} needs a GPU and run.device=cpu has none; drop it for runs on the CPU")
    modules = config.policy.recompute_modules
    if not model.num_experts and {"moe", "moe_act"} & set(modules):
        raise ValueError(f"policy.recompute_modules={modules}: moe and moe_act need a model with experts; take them out")
    if config.policy.fp8 is not None:
        fp8_rules.check(config.policy.fp8, model, config.layout.to_layout(), config.model.dtype, on_cpu=on_cpu(config))
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    if longest > model.max_positions:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_tokens = {longest} exceeds the model's {model.max_positions} positions; lower one of them"
        )
    if config.rollout.tensor_parallel > model.num_kv_heads or model.num_heads % config.rollout.tensor_parallel:
        raise ValueError(
            f"rollout.tensor_parallel={config.rollout.tensor_parallel} does not divide the model's {model.num_heads} heads "
            f"({model.num_kv_heads} key/value heads); lower it"
        )
    data = config.data
    if data.path is None:
        raise ValueError("data.path is required: a .jsonl or .parquet file of problems (tools/download_data.py makes one)")
    load_rows(data.path, data.prompt_key, data.answer_key)
    if config.evaluation.path is not None:
        load_rows(config.evaluation.path, data.prompt_key, data.answer_key, "evaluation.path")
    load_verifier(config.reward.verifier)
    if config.rollout.base_port is not None:
        for index in range(config.rollout.engines):
            checked_port(config.rollout.base_port, index)


def on_cpu(config: RunConfig) -> bool:
    """Whether ranks compute on the CPU. ValueError when run.device=cuda cannot be had."""
    import torch

    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device=cuda but torch sees no GPU; use run.device=cpu or install the GPU stack (requirements.txt)")
    return config.run.device == "cpu" or not torch.cuda.is_available()


def prepare_device(config: RunConfig) -> bool:
    """Give this rank its share of the cores, or its GPU. Returns `on_cpu`."""
    import torch

    cpu = on_cpu(config)
    if cpu:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return cpu


def describe(config: RunConfig) -> str:
    """The resolved configuration, the layout and the processes a run would start."""
    layout, rollout = config.layout.to_layout(), config.rollout
    return (
        f"{config.dump()}\n"
        f"# layout: {layout.describe()} = {layout.world_size} policy ranks\n"
        f"# processes: {layout.world_size} policy ranks (rank 0 is the controller), {rollout.engines} vLLM servers of tensor-parallel "
        f"size {rollout.tensor_parallel}, {config.reward.workers} grading workers\n"
        f"# per step: {config.sampling.prompts_per_step} groups of {config.sampling.samples_per_prompt} samples, "
        f"{config.batch.updates_per_step} updates"
    )


def launch(config: RunConfig) -> int:
    """Check, write `<run.dir>/config.yaml`, start the ranks on this host, wait; returns the exit status.

    SIGTERM and Ctrl-C are passed on once: the ranks then save a checkpoint and end.
    """
    check(config)
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / "config.yaml"
    file.write_text(config.dump())
    return start_ranks(config, ["-m", "megatron_dapo.train", str(file)])


def start_ranks(config: RunConfig, arguments: list[str]) -> int:
    """Run `python *arguments` on as many ranks as the layout has, on this host, through torchrun's launcher API."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    world = config.layout.to_layout().world_size
    if on_cpu(config):
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // world))
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that spins at a barrier takes a core from the engines
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
        signals_to_handle="SIGQUIT",  # SIGTERM and SIGINT are ours, below
    )
    try:
        elastic_launch(settings, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"error: rank {rank} ended with exit code {failure.exitcode}; its message is above", file=sys.stderr)
        return 1
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)
        logs.cleanup()
    return 0


def run_rank(config: RunConfig) -> int:
    """One rank, inside torchrun's environment. It dies with its parent."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for sign in (signal.SIGTERM, signal.SIGINT):  # until there is something to save; then the Trainer decides
        signal.signal(sign, lambda *_: os._exit(0))
    import warnings

    warnings.filterwarnings("ignore", module=r"(torch|megatron|megatron_dapo\.policy\.cpu)\b")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    cpu = prepare_device(config)
    from megatron_dapo.policy import parallel
    from megatron_dapo.trainer import EXPECTED, Trainer

    try:
        Trainer(config, on_cpu=cpu).run()
    except EXPECTED as error:
        if os.environ["RANK"] == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if os.environ["RANK"] == "0" or "onnection closed by peer" not in str(error):
            raise
        return 1  # another rank has failed and said why
    parallel.stop()
    return 0


def _pass_on(number: int, frame: Any) -> None:
    """Send the signal to the ranks, which are this process's children."""
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
