"""One stock vLLM server as a child process: start, watch, stop.

The child runs in its own session, listens on 127.0.0.1 or the address that rank 0 reaches it by, demands the
run's token, and dies with us (even by kill -9).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, Protocol

import aiohttp

from megatron_dapo.config import RolloutConfig, RunConfig
from megatron_dapo.environment import (
    DIGEST_VARIABLE,
    ENGINE_VARIABLE,
    PLUGIN,
    TOKEN_VARIABLE,
    WORKER_EXTENSION,
)
from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import read_model
from megatron_dapo.rollout.errors import OUT_OF_FILES, EngineDied, out_of_files
from megatron_dapo.rollout.ports import LOOPBACK, checked_port, free_port
from megatron_dapo.rollout.server_log import quote_log
from megatron_dapo.weights.block_fp8 import quantization_config
from megatron_dapo.weights.names import hf_shapes

STOP_GRACE_S = 10.0
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# On a CPU vLLM gives a lone worker a process of its own, to set its threads; `environment` sets them for all.
# Without it a start takes a third and generation an eighth less processor time.
WORKER_IN_ENGINE_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"

# What torchrun and the training environment leave behind; vLLM would take it for its own.
TORCHRUN_VARIABLES = frozenset(
    f"{kind}{what}" for kind in ("", "LOCAL_", "GROUP_", "ROLE_") for what in ("RANK", "WORLD_SIZE")
) | {"ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "CUDA_DEVICE_MAX_CONNECTIONS"}
TORCHRUN_PREFIXES = ("TORCHELASTIC_", "TORCH_NCCL_", "PET_")

# Runs before vLLM is imported: ask the kernel to kill this process with its parent, then become the server.
# The request survives exec, and unlike preexec_fn nothing runs between fork and exec of a threaded parent. So
# would signals that the parent ignores.
BOOTSTRAP = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
for sign in (signal.SIGTERM, signal.SIGINT):
    signal.signal(sign, signal.SIG_DFL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class EngineStartTimeout(TimeoutError):
    """A server did not become healthy in time."""


class EngineServer:
    """A vLLM server of this host: engine `index` of the run, and `slot` of this host (the same, unless said
    otherwise). It listens on `address`. `extra_env` is added to its environment last. load_format: with
    "dummy" its weights are small random numbers until a push brings others. sleeps: it may be put to sleep.

    Call `start` from a thread that lives as long as the run: the kernel ends the child when the thread that
    started it ends.
    """

    def __init__(
        self,
        index: int,
        model: str,
        rollout: RolloutConfig,
        dtype: Literal["fp32", "bf16"],
        max_model_len: int,
        run_dir: Path,
        token: str,
        seed: int,
        extra_env: dict[str, str] | None = None,
        device: Literal["cpu", "cuda"] | None = None,
        *,
        slot: int | None = None,
        address: str = LOOPBACK,
        load_format: Literal["dummy", "auto"] = "auto",
        sleeps: bool = False,
    ) -> None:
        self.index = index
        self._slot, self._address = index if slot is None else slot, address
        self.model = model
        self.log_path = Path(run_dir) / "logs" / f"engine_{index}.log"
        self._rollout, self._dtype, self._max_model_len, self._seed = rollout, dtype, max_model_len, seed
        self._load_format, self._sleeps, self._token = load_format, sleeps, token
        self._extra_env = dict(extra_env or {})
        self._on_cpu = (device or vllm_device()) == "cpu"
        self._process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None
        self._log_start = 0
        self._scratch = ""

    @property
    def url(self) -> str:
        if self._port is None:
            raise ValueError(f"engine {self.index} has no address before start()")
        host = f"[{self._address}]" if ":" in self._address else self._address
        return f"http://{host}:{self._port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the server process; it answers only after `wait_healthy`. UserError for a port in use."""
        assert self._process is None, "start() of a server that was not stopped"
        self._port = self._choose_port()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # for the sockets that vLLM leaves behind when it is killed
        self._scratch = tempfile.mkdtemp(prefix="dapo_engine_")
        python = self._rollout.python or sys.executable
        command = [python, "-c", BOOTSTRAP, str(os.getpid()), *self.arguments(self._port)]
        with open(self.log_path, "ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.environment(), "TMPDIR": self._scratch},
                start_new_session=True,
            )

    def cpu_seconds(self) -> float:
        """Processor time of the API process alone (the engine core and the workers are its children)."""
        if self._process is None:
            raise ValueError(f"engine {self.index} does not run")
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system

    def poll(self) -> int | None:
        """None while the server runs, else its exit code (minus the signal's number if one killed it); 0 when
        it was stopped.
        """
        if self._process is None:
            return 0
        # The zombie stays until stop(), so that its process group cannot become someone else's.
        if (ended := _ended(self._process.pid)) is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    async def wait_healthy(self, timeout: float) -> None:
        """Return when /health answers 200. EngineDied or EngineStartTimeout, both with the end of the log."""
        await until_healthy(self, timeout)

    def stop(self) -> None:
        """End the server and everything it started; does nothing when it is not running."""
        if self._process is None:
            return
        process, self._process = self._process, None
        deadline = time.monotonic() + STOP_GRACE_S
        os.kill(
            process.pid, signal.SIGTERM
        )  # Popen's own calls would collect the zombie, and with it the group's name
        while time.monotonic() < deadline and _group_is_alive(process.pid):
            time.sleep(0.1)  # the last one removes the others' shared memory from /dev/shm, so let it
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def log_tail(self) -> str:
        """What this start's log says about an end: root causes, the last lines, and the path of the whole."""
        try:
            with open(self.log_path, "rb") as log:
                log.seek(self._log_start)
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            lines = []
        return quote_log(lines, self.log_path)

    def arguments(self, port: int) -> list[str]:
        """The arguments of the Python interpreter that becomes the server."""
        rollout = self._rollout
        arguments = [
            *("-m", "vllm.entrypoints.openai.api_server"),
            *("--model", self.model),
            *("--host", self._address),
            *("--port", str(port)),
            *("--dtype", DTYPES[self._dtype]),
            *("--seed", str(self._seed)),
            *("--max-model-len", str(self._max_model_len)),
            *("--max-num-seqs", str(rollout.max_concurrency)),
            *("--tensor-parallel-size", str(rollout.tensor_parallel)),
            *("--middleware", "megatron_dapo.rollout.middleware.RunToken"),
            *("--weight-transfer-config", json.dumps({"backend": PLUGIN})),
            *("--worker-extension-cls", WORKER_EXTENSION),
            *("--logprobs-mode", "processed_logprobs"),
            *("--uvicorn-log-level", "warning"),
            "--enable-scale-out",  # /inference/v1/generate
            "--skip-tokenizer-init",  # tokens in, tokens out
            "--disable-uvicorn-access-log",
            "--disable-fastapi-docs",
        ]
        if self._on_cpu:
            # A prompt prefilled in parts makes vLLM rewind the request's generator, which only CUDA's can:
            # with a seed on CPU that ends the engine.
            arguments += ["--enforce-eager", "--no-enable-chunked-prefill"]
            if rollout.tensor_parallel == 1:
                arguments += ["--distributed-executor-backend", WORKER_IN_ENGINE_CORE]
        else:
            arguments += ["--gpu-memory-utilization", str(rollout.memory_utilization)]
            if self._sleeps:  # a CPU worker does so without it, and gives nothing back
                arguments += ["--enable-sleep-mode"]
        if self._extra_env.get(DIGEST_VARIABLE):
            arguments += ["--load-format", PLUGIN]  # sync/vllm/digest.py
        elif self._load_format == "dummy":
            arguments += ["--load-format", "dummy"]
        if rollout.quantization:
            quantization = quantization_config(hf_shapes(read_model(Path(self.model))))
            arguments += ["--hf-overrides", json.dumps({"quantization_config": quantization})]
        return arguments + list(rollout.extra_args)

    def environment(self) -> dict[str, str]:
        """Ours without torchrun's variables, plus what the server needs."""
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in TORCHRUN_VARIABLES and not key.startswith(TORCHRUN_PREFIXES)
        }
        environment |= {
            ENGINE_VARIABLE: str(self.index),  # tells the plugin that the process is ours
            TOKEN_VARIABLE: self._token,
            "VLLM_SERVER_DEV_MODE": "1",  # the weight-update routes
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",  # s; the client closes idle connections first
            # The server's processes talk among themselves; the ranks' interface is that to other hosts.
            "GLOO_SOCKET_IFNAME": "lo",
            "VLLM_HOST_IP": LOOPBACK,
        }
        if Path(self.model).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"
        if self._on_cpu:
            cores = len(os.sched_getaffinity(0))
            environment |= {
                "VLLM_CPU_KVCACHE_SPACE": str(self._rollout.cpu_kv_cache_gib),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                # One thread per sequence's attention: log-probabilities then do not depend on what else is in
                # the batch.
                "VLLM_CPU_ATTN_SPLIT_KV": "0",
                # A thread that spins at a barrier keeps its partner from the core they share with other
                # processes: with all cores busy, hundreds of tokens/s instead of thousands. On an idle
                # machine passive waiting costs a few percent.
                "OMP_WAIT_POLICY": "PASSIVE",
                "OMP_NUM_THREADS": str(
                    max(1, cores // (self._rollout.engines * self._rollout.tensor_parallel))
                ),
            }
        else:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices()
        return environment | self._extra_env

    def _devices(self) -> str:
        """The i-th engine of a host takes the i-th run of tensor_parallel GPUs among the visible ones."""
        size, count = self._rollout.tensor_parallel, self._rollout.engines
        first = self._slot * size
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(first + size)]
        if len(names) < first + size:
            raise UserError(
                f"rollout.engines={count} x rollout.tensor_parallel={size} needs more GPUs than the "
                f"{len(names)} of "
                f"CUDA_VISIBLE_DEVICES={visible}; lower one of them"
            )
        return ",".join(names[first : first + size])

    def _choose_port(self) -> int:
        if self._rollout.base_port is None:
            return free_port(self._address)
        return checked_port(self._rollout.base_port, self.index, self._address)


class Started(Protocol):
    """A server that was started: an EngineServer, or one on another host (hosts.py)."""

    index: int

    @property
    def url(self) -> str: ...
    def poll(self) -> int | None: ...
    def log_tail(self) -> str: ...


async def until_healthy(server: Started, timeout: float) -> None:
    """Return when /health answers 200. EngineDied or EngineStartTimeout, both with the end of the log."""
    deadline = time.monotonic() + timeout
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        while True:
            if (code := server.poll()) is not None:
                raise EngineDied(
                    f"engine {server.index} ended with exit code {code} before it was healthy.\n"
                    f"{server.log_tail()}"
                )
            try:
                async with session.get(f"{server.url}/health") as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError) as error:
                if out_of_files(error):
                    raise UserError(OUT_OF_FILES) from error
            if time.monotonic() > deadline:
                raise EngineStartTimeout(
                    f"engine {server.index} was not healthy after {timeout:g} s; raise "
                    f"rollout.start_timeout_s if it is still loading.\n{server.log_tail()}"
                )
            await asyncio.sleep(0.2)


def digest_folder(config: RunConfig) -> Path:
    """Where servers write digests of their parameters, each in a folder of its own, with run.verify_sync."""
    return Path(config.run.dir).resolve() / "digests"


def make_server(
    config: RunConfig,
    index: int,
    folder: Path,
    token: str,
    *,
    digests: str,
    slot: int | None = None,
    address: str = LOOPBACK,
    load_format: Literal["dummy", "auto"] | None = None,
) -> EngineServer:
    """The server that `config` describes, on the model in `folder` (EngineServer); load_format: default
    rollout.load_format. With run.verify_sync it loads the checkpoint, and writes digests of its parameters
    into the run's `digests/<digests>`.
    """
    extra = {DIGEST_VARIABLE: str(digest_folder(config) / digests)} if config.run.verify_sync else None
    return EngineServer(
        index,
        str(folder),
        config.rollout,
        config.model.dtype,
        config.data.max_prompt_tokens + config.rollout.max_tokens,
        Path(config.run.dir).resolve(),
        token,
        config.run.seed,
        extra,
        slot=slot,
        address=address,
        load_format=load_format or config.rollout.load_format,
        sleeps=engines_sleep(config),
    )


def _ended(pid: int) -> os.waitid_result | None:
    """How a child ended, without collecting it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _group_is_alive(group: int) -> bool:
    """Whether a process group has a member that is not a zombie."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has ended meanwhile
        if int(its_group) == group and state not in "ZX":
            return True
    return False


def engines_sleep(config: RunConfig) -> bool:
    """Whether engines sleep while the policy trains. rollout.sleep=auto: where both are on GPUs, and nothing
    is sampled meanwhile.
    """
    rollout = config.rollout
    if isinstance(rollout.sleep, bool):
        return rollout.sleep
    shares_gpus = rollout.colocated and config.run.device != "cpu" and vllm_device() == "cuda"
    return shares_gpus and config.sampling.max_age == 0


def vllm_device() -> Literal["cpu", "cuda"]:
    """What vLLM will run on: CUDA where torch sees it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
