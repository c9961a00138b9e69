"""What a GPU configuration's engines are started with, on a machine without a GPU: vLLM's own parser reads
the command line of every shipped configuration, and each engine has GPUs of its own, those of the ranks that
bring its weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dapo.config import RunConfig
from megatron_dapo.environment import PLUGIN, WORKER_EXTENSION
from megatron_dapo.rollout import server as server_file
from megatron_dapo.sync.plan import Worker, make_plan
from megatron_dapo.sync.sinks import SinkTable

CONFIGS = Path(__file__).parents[2] / "examples/configs"
SHIPPED = ["qwen7b_1node", "qwen3_30b_a3b", "qwen32b", "qwen32b_async"]
GPUS = [str(number) for number in range(8)]  # of a host


def servers(name: str, folder: Path, monkeypatch, *overrides: str) -> list[server_file.EngineServer]:
    """Those of one host of the configuration."""
    monkeypatch.setattr(server_file, "vllm_device", lambda: "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = RunConfig.load(CONFIGS / f"{name}.yaml", [f"run.dir={folder}", *overrides])
    return [
        server_file.make_server(config, index, folder, "token", digests="", slot=index)
        for index in range(config.rollout.engines)
    ]


def test_every_gpu_configuration_is_here():
    of_gpus = [path.stem for path in CONFIGS.glob("*.yaml") if "device: cuda" in path.read_text()]
    assert sorted(of_gpus) == sorted(SHIPPED)


@pytest.fixture(scope="module")
def parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("quantization", [None, "fp8_block"])
def test_vllm_parses_it(name, quantization, tmp_path, monkeypatch, parser):
    overrides = []
    if quantization:
        overrides = [f"rollout.quantization={quantization}"]
        monkeypatch.setattr(server_file, "read_model", lambda folder: None)
        monkeypatch.setattr(
            server_file, "hf_shapes", lambda spec: {"model.layers.0.mlp.w.weight": (256, 256)}
        )
    for server in servers(name, tmp_path, monkeypatch, *overrides):
        rollout = server._rollout
        arguments = server.arguments(8123)
        assert arguments[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
        parsed = parser.parse_args(arguments[2:])
        found = {
            "model": parsed.model,
            "port": parsed.port,
            "dtype": parsed.dtype,
            "tensor_parallel_size": parsed.tensor_parallel_size,
            "gpu_memory_utilization": parsed.gpu_memory_utilization,
            "enable_sleep_mode": parsed.enable_sleep_mode,
            "load_format": parsed.load_format,
            "backend": parsed.weight_transfer_config.backend,
            "worker_extension_cls": parsed.worker_extension_cls,
            "logprobs_mode": parsed.logprobs_mode,
            "max_num_seqs": parsed.max_num_seqs,
            "max_model_len": parsed.max_model_len,
            "eager": parsed.enforce_eager,
            "quantised": bool(parsed.hf_overrides),
        }
        assert found == {
            "model": str(tmp_path),
            "port": 8123,
            "dtype": "bfloat16",
            "tensor_parallel_size": rollout.tensor_parallel,
            "gpu_memory_utilization": rollout.memory_utilization,
            "enable_sleep_mode": name != "qwen32b_async",  # whose engines are never idle
            "load_format": "dummy",
            "backend": PLUGIN,
            "worker_extension_cls": WORKER_EXTENSION,
            "logprobs_mode": "processed_logprobs",
            "max_num_seqs": rollout.max_concurrency,
            "max_model_len": server._max_model_len,
            "eager": False,
            "quantised": quantization is not None,
        }


def test_vllms_parser_refuses_what_it_does_not_know(tmp_path, monkeypatch, parser, capsys):
    extra = 'rollout.extra_args=["--no-such-option"]'
    arguments = servers("qwen7b_1node", tmp_path, monkeypatch, extra)[0].arguments(8123)
    with pytest.raises(SystemExit):
        parser.parse_args(arguments[2:])
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize("name", SHIPPED)
def test_engines_share_a_host_without_sharing_gpus(name, tmp_path, monkeypatch):
    """And, colocated, worker w of engine e runs on the GPU of the rank that carries its weights."""
    devices: list[str] = []
    workers = []
    for number, server in enumerate(servers(name, tmp_path, monkeypatch)):
        own = server.environment()["CUDA_VISIBLE_DEVICES"].split(",")
        tp = server._rollout.tensor_parallel
        assert len(own) == tp
        for rank in range(tp):
            table = SinkTable(sinks=(), dtypes={}, shapes={}, tp=tp, tp_rank=rank)
            place = {"host": "a", "device": len(workers)}
            workers.append(Worker(engine=f"engine_{number}", rank=rank, table=table, **place))
        devices += own
    assert devices == GPUS
    hosts = ["b"] * len(GPUS) + ["a"] * len(GPUS)
    plan = make_plan(workers, [], hosts, chunk_bytes=1 << 20, dtype="bfloat16")
    local_ranks = [int(carrier) - len(GPUS) for carrier in plan.carriers]
    assert [GPUS[rank] for rank in local_ranks] == devices
