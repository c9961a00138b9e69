"""Run a function on several ranks: `run_ranks("support.jobs_policy:measure", 4, ...)` calls it in 4 processes
of torchrun.

The function takes the keyword arguments (anything JSON can say, and dataclasses of it) and returns something
JSON can say; `run_ranks` returns one result per rank. Ranks die with torchrun, torchrun dies with the test,
and a launch that takes too long is killed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
PR_SET_PDEATHSIG = 1


def run_ranks(job: str, world: int, *, timeout_s: float = 240, **arguments: Any) -> list[Any]:
    """Results of `module:function`, by rank. AssertionError quotes the last lines when a rank fails or time
    is up.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arguments.json").write_text(json.dumps(arguments, default=_encode))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command += [str(TESTS / "support" / "ranks.py"), job, name]
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(TESTS), str(TESTS.parent)]))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        with open(folder / "log", "w+") as log:
            process = subprocess.Popen(
                command,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
            try:
                code: int | str = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = f"still running after {timeout_s} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            log.seek(0)
            assert code == 0, f"{job} on {world} ranks: {code}\n{log.read()[-20000:]}"
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def _encode(value: Any) -> dict[str, Any]:
    """A dataclass as its fields and where its class is found."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {"dataclass": f"{type(value).__module__}:{type(value).__qualname__}", "fields": fields}


def _decode(value: dict[str, Any]) -> Any:
    if value.keys() != {"dataclass", "fields"}:
        return value
    module, name = value["dataclass"].split(":")
    return getattr(importlib.import_module(module), name)(**value["fields"])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _import_less() -> None:
    """Keep Megatron from importing wandb and torch's compiler, which take 2.4 of the 6 seconds of processor
    time that a policy's imports cost each rank. What it would have compiled runs as it is written.
    """
    jit: Any = types.ModuleType("megatron.core.jit")
    jit.jit_fuser = jit.noop_decorator = lambda function: function
    jit.enable_jit_fuser = jit.disable_jit_fuser = lambda: None
    sys.modules["megatron.core.jit"] = jit
    sys.modules["wandb"] = None  # type: ignore[assignment]


def main(job: str, folder: str) -> None:
    """What torchrun starts on every rank."""
    _die_with_parent()
    _import_less()
    module, function = job.split(":")
    arguments = json.loads((Path(folder) / "arguments.json").read_text(), object_hook=_decode)
    result = getattr(importlib.import_module(module), function)(**arguments)
    (Path(folder) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
    import torch.distributed as dist

    if dist.is_initialized():  # a rank that ends while its connections are open may be aborted
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
