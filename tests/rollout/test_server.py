"""Starting, watching and ending vLLM servers. Tests that start one of their own take half a minute each, so
they are few.
"""

from __future__ import annotations

import errno
import json
import socket
import time
from pathlib import Path

import aiohttp
import pytest
from support.models import TOKEN
from support.servers import wait_until_gone

from megatron_dapo.config import RolloutConfig, RunConfig
from megatron_dapo.environment import DIGEST_VARIABLE, PLUGIN
from megatron_dapo.errors import UserError
from megatron_dapo.rollout import server as server_module
from megatron_dapo.rollout.client import EngineDied
from megatron_dapo.rollout.ports import free_port
from megatron_dapo.rollout.server import EngineServer, EngineStartTimeout


def make_server(
    run_dir: Path, model: str = "model", extra_env: dict[str, str] | None = None, device="cpu", **rollout
) -> EngineServer:
    return EngineServer(
        index=rollout.pop("index", 0),
        model=model,
        rollout=RolloutConfig(**rollout),
        dtype="fp32",
        max_model_len=128,
        run_dir=run_dir,
        token=TOKEN,
        seed=3,
        extra_env=extra_env,
        device=device,
    )


def test_torchrun_leaves_no_trace_in_the_environment(monkeypatch, tmp_path):
    torchrun = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "ROLE_NAME": "x",
    }
    torchrun |= {
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "b",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    for name, value in (torchrun | {"KEPT": "yes"}).items():
        monkeypatch.setenv(name, value)
    environment = make_server(tmp_path, extra_env={"MORE": "1", "OMP_NUM_THREADS": "7"}).environment()
    assert not torchrun.keys() & environment.keys()
    assert environment["KEPT"] == "yes"
    assert (environment["MORE"], environment["OMP_NUM_THREADS"]) == ("1", "7")
    assert environment["MEGATRON_DAPO_TOKEN"] == TOKEN
    assert "HF_HUB_OFFLINE" not in environment
    assert make_server(tmp_path, model=str(tmp_path)).environment()["HF_HUB_OFFLINE"] == "1"


def test_the_token_is_not_on_the_command_line(tmp_path):
    server = make_server(tmp_path, extra_args=["--more", "1"])
    arguments = server.arguments(8000)
    assert not any(TOKEN in argument for argument in arguments)
    assert arguments[-2:] == ["--more", "1"]
    assert "--load-format" not in arguments
    assert "--load-format" in make_server(tmp_path, extra_env={DIGEST_VARIABLE: "folder"}).arguments(8000)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "dummy"),
        (["rollout.load_format=auto"], None),
        (["run.verify_sync=true"], PLUGIN),  # digests are of what was loaded
    ],
)
def test_a_runs_server_starts_with_dummy_weights_unless_they_are_looked_at(tmp_path, values, expected):
    config = RunConfig.load(None, ["model.path=model", f"run.dir={tmp_path}", *values])
    arguments = server_module.make_server(config, 0, tmp_path, TOKEN, digests="engine_0").arguments(8000)
    found = arguments[arguments.index("--load-format") + 1] if "--load-format" in arguments else None
    assert found == expected
    fresh = server_module.make_server(config, 0, tmp_path, TOKEN, digests="fresh", load_format="auto")
    assert "dummy" not in fresh.arguments(8000)


def test_a_server_in_fp8_is_told_what_is_quantised(tmp_path, small_llama):
    def arguments(*values: str) -> list[str]:
        config = RunConfig.load(None, [f"model.path={small_llama}", f"run.dir={tmp_path}", *values])
        return server_module.make_server(config, 0, small_llama, TOKEN, digests="").arguments(8000)

    plain, fp8 = arguments(), arguments("rollout.quantization=fp8_block")
    at = fp8.index("--hf-overrides")
    assert fp8[:at] + fp8[at + 2 :] == plain
    assert json.loads(fp8[at + 1]) == {
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["model.embed_tokens", "lm_head"],
        }
    }


@pytest.mark.parametrize(
    ("values", "device", "sleeps"),
    [
        (["sampling.max_age=0"], "cuda", True),
        (["sampling.max_age=0"], "cpu", False),
        (["sampling.max_age=0", "run.device=cpu"], "cuda", False),  # the policy is not on the GPUs
        (["sampling.max_age=0", "rollout.colocated=false"], "cuda", False),
        (["sampling.max_age=0", "rollout.sleep=false"], "cuda", False),
        (["sampling.max_age=1"], "cuda", False),
        (["sampling.max_age=0", "rollout.sleep=true"], "cpu", True),
    ],
)
def test_who_sleeps(tmp_path, monkeypatch, values, device, sleeps):
    monkeypatch.setattr(server_module, "vllm_device", lambda: device)
    config = RunConfig.load(None, ["model.path=model", f"run.dir={tmp_path}", *values])
    assert server_module.engines_sleep(config) is sleeps
    arguments = server_module.make_server(config, 0, tmp_path, TOKEN, digests="engine_0").arguments(8000)
    assert ("--enable-sleep-mode" in arguments) == (sleeps and device == "cuda")  # a CPU's vLLM refuses it


@pytest.mark.parametrize(("tp", "device", "alone"), [(1, "cpu", True), (2, "cpu", False), (1, "cuda", False)])
def test_a_lone_cpu_worker_has_no_process_of_its_own(tmp_path, tp, device, alone):
    arguments = make_server(tmp_path, device=device, tensor_parallel=tp).arguments(8000)
    assert ("--distributed-executor-backend" in arguments) == alone


@pytest.mark.parametrize(
    ("visible", "index", "expected"),
    [(None, 0, "0,1"), (None, 1, "2,3"), ("4,5,6,7", 1, "6,7"), ("GPU-a,GPU-b", 0, "GPU-a,GPU-b")],
)
def test_each_engine_has_gpus_of_its_own(monkeypatch, tmp_path, visible, index, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    server = make_server(tmp_path, device="cuda", index=index, tensor_parallel=2)
    assert server.environment()["CUDA_VISIBLE_DEVICES"] == expected
    assert "--enforce-eager" not in server.arguments(1)


def test_too_few_gpus_is_said_before_the_start(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ValueError, match=r"rollout\.engines=2 x rollout\.tensor_parallel=2.*3"):
        make_server(tmp_path, device="cuda", index=1, engines=2, tensor_parallel=2).environment()


def test_a_port_in_use_is_said_before_the_start(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = make_server(tmp_path, index=1, base_port=port - 1)
        with pytest.raises(
            ValueError, match=rf"rollout\.base_port={port - 1}: port {port} for engine 1.*null"
        ):
            server.start()
    assert server.pid is None


def test_free_ports_are_given_out_once():
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50


def test_before_the_start(tmp_path):
    server = make_server(tmp_path)
    with pytest.raises(ValueError, match="start"):
        _ = server.url
    server.stop()
    assert "(empty)" in server.log_tail()


def test_only_this_starts_part_of_the_log_is_quoted(tmp_path):
    server = make_server(tmp_path)
    server.log_path.parent.mkdir(parents=True)
    before = "ValueError: of an earlier start\n"
    server.log_path.write_text(before + "RuntimeError: head_dim=16 is odd\n")
    server._log_start = len(before)
    tail = server.log_tail()
    assert tail.startswith("  | RuntimeError: head_dim=16 is odd\n") and str(server.log_path) in tail
    assert "earlier" not in tail


async def test_no_file_descriptor_left_at_a_start_is_said(tmp_path, monkeypatch):
    def no_socket(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    server = make_server(tmp_path)
    monkeypatch.setattr(server, "poll", lambda: None)
    server._port = 1
    monkeypatch.setattr(aiohttp.connector.aiohappyeyeballs, "start_connection", no_socket)
    with pytest.raises(UserError, match="ulimit -n"):
        await server.wait_healthy(5)


async def test_a_server_that_ends_at_its_start_quotes_its_log(tmp_path):
    server = make_server(tmp_path, model=str(tmp_path), extra_args=["--no-such-flag"])
    server.start()
    assert server.poll() is None
    with pytest.raises(EngineStartTimeout, match=r"rollout\.start_timeout_s"):
        await server.wait_healthy(0.1)
    with pytest.raises(EngineDied, match="unrecognized arguments: --no-such-flag") as caught:
        await server.wait_healthy(120)
    assert str(tmp_path / "logs" / "engine_0.log") in str(caught.value)
    assert server.poll() == 2
    server.stop()
    assert server.poll() == 0


def test_stopping_during_the_start_leaves_nothing(tmp_path, tiny_model):
    server = make_server(tmp_path, model=str(tiny_model))
    server.start()
    group = server.pid
    time.sleep(3)
    start = time.monotonic()
    server.stop()
    assert time.monotonic() - start < server_module.STOP_GRACE_S + 2
    wait_until_gone(group, 5)


class FakeServer(EngineServer):
    """A leader that ends on SIGTERM and a helper of its group that ends `delay` seconds later, leaving a
    file.
    """

    delay = 0.0

    def arguments(self, port: int) -> list[str]:
        folder = str(self.log_path.parent)
        helper = (
            f"import pathlib, time; time.sleep(1 + {self.delay}); pathlib.Path({folder!r}, 'tidy').touch()"
        )
        return [
            "-c",
            f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {helper!r}]); "
            f"time.sleep(100)",
        ]


@pytest.mark.parametrize(("delay", "tidied"), [(0.0, True), (60.0, False)])
def test_helpers_may_tidy_up_but_not_forever(monkeypatch, tmp_path, delay, tidied):
    monkeypatch.setattr(server_module, "STOP_GRACE_S", 3.0)
    monkeypatch.setattr(FakeServer, "delay", delay)
    server = FakeServer(0, "model", RolloutConfig(), "fp32", 128, tmp_path, TOKEN, 0, device="cpu")
    server.start()
    group = server.pid
    time.sleep(0.5)
    assert server.poll() is None
    start = time.monotonic()
    server.stop()
    assert time.monotonic() - start < 3.0 + 1.0
    assert (tmp_path / "logs" / "tidy").exists() == tidied
    wait_until_gone(group, 1)
