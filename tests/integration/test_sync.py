"""After an update every parameter in the engine is bit-equal to what a fresh server loads from the exported
checkpoint.

The digests are taken on the parameters as loaded, before vLLM repacks them; that they can differ is shown by
changing one element.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_tiny_model
from support.runs import metrics, overrides, started, write_data

from megatron_dapo.sync.verify import SyncMismatch, compare_digests

pytestmark = pytest.mark.timeout(1800)
ENGINES = [1, pytest.param(2, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=ENGINES, ids=lambda tp: f"engine_tp{tp}")
def verified(request, tmp_path_factory) -> SimpleNamespace:
    """A run of two updates at trainer tp2 x pp2 with run.verify_sync, untied so that every kind of parameter
    is there.
    """
    folder = tmp_path_factory.mktemp(f"sync_tp{request.param}")
    model = make_tiny_model(folder / "model", tied=False, layers=4, max_positions=1024)
    data, run_dir = write_data(folder / "data"), folder / "run"
    layout = {"layout__data_parallel": 1, "layout__tensor_parallel": 2, "layout__pipeline_parallel": 2}
    arguments = overrides(
        model,
        data,
        run_dir,
        **layout,
        rollout__tensor_parallel=request.param,
        run__max_steps=2,
        run__verify_sync=True,
    )
    with started(arguments, data, folder / "log") as run:
        status = run.wait()
        gone = run.all_gone()
    return SimpleNamespace(
        folder=folder,
        model=model,
        run_dir=run_dir,
        status=status,
        gone=gone,
        log=run.text,
        tp=request.param,
        data=data,
    )


def digests(verified: SimpleNamespace, who: str, rank: int, label: str) -> dict[str, str]:
    return json.loads((verified.run_dir / "digests" / who / f"tp{rank}-{label}.json").read_text())


def test_the_run_verifies_its_engines(verified):
    assert verified.status == 0 and verified.gone, verified.log
    # 4 layers of 2 norms, qkv weight and bias, o, gate_up, down; embedding, last norm, lm_head; per
    # tensor-parallel rank.
    assert f"verified: {(4 * 7 + 3) * verified.tp} parameters" in verified.log


def test_every_parameter_equals_the_export_in_a_fresh_server(verified):
    for rank in range(verified.tp):
        fresh = digests(verified, "fresh", rank, "load")
        assert len(fresh) == 4 * 7 + 3
        assert digests(verified, "engine_0", rank, "v2") == fresh
        # The same names, and no value survived the updates: a push of nothing would not pass.
        for earlier in ("load", "v0", "v1"):
            held = digests(verified, "engine_0", rank, earlier)
            assert held.keys() == fresh.keys()
            assert all(held[name] != fresh[name] for name in fresh), earlier
        assert digests(verified, "engine_0", rank, "v0") == digests(verified, "engine_0", rank, "load")


def test_engine_and_policy_agree(verified):
    for line in metrics(verified.run_dir):
        assert line["policy/fresh_tokens"] > 0
        assert line["policy/rollout_logprob_gap"] < 1e-4


def test_one_changed_element_is_caught_and_named(verified):
    """The smallest change of one weight in a copy of the export: only the parameter that holds it differs, on
    one rank.
    """
    changed = verified.folder / "changed"
    shutil.copytree(verified.run_dir / "hf", changed, dirs_exist_ok=True)
    name = "model.layers.2.mlp.up_proj.weight"
    [file] = [path for path in sorted(changed.glob("*.safetensors")) if name in load_file(path)]
    tensors = load_file(file)
    row = tensors[name].shape[0] - 1  # the last rank's
    tensors[name][row, 7] = torch.nextafter(tensors[name][row, 7], torch.tensor(torch.inf))
    save_file(tensors, file, metadata={"format": "pt"})

    changed_digests = load_in_server(changed, verified)
    for rank in range(verified.tp):
        expected = digests(verified, "fresh", rank, "load")
        different = {key for key in expected if changed_digests[rank][key] != expected[key]}
        assert different == ({"model.layers.2.mlp.gate_up_proj.weight"} if rank == verified.tp - 1 else set())

    # The run's own check says so in words.
    folder = verified.run_dir / "digests"
    for rank, values in enumerate(changed_digests):
        (folder / "engine_0" / f"tp{rank}-v9.json").write_text(json.dumps(values))
    with pytest.raises(
        SyncMismatch, match=r"1 of 31 parameters: model\.layers\.2\.mlp\.gate_up_proj\.weight"
    ):
        compare_digests(
            folder, ["engine_0"], tensor_parallel=verified.tp, version=9, export=verified.run_dir / "hf"
        )


def load_in_server(model: Path, verified: SimpleNamespace) -> list[dict[str, str]]:
    """Digests of what a fresh server loads from `model`, per tensor-parallel rank."""
    from megatron_dapo.config import RolloutConfig
    from megatron_dapo.rollout.server import EngineServer

    folder = verified.folder / "changed_digests"
    server = EngineServer(
        index=0,
        model=str(model),
        rollout=RolloutConfig(max_concurrency=64, tensor_parallel=verified.tp),
        dtype="fp32",
        max_model_len=64,
        run_dir=verified.folder,
        token="token-of-the-sync-test",
        seed=0,
        extra_env={"MEGATRON_DAPO_DIGEST_DIR": str(folder)},
    )
    server.start()
    try:
        asyncio.run(server.wait_healthy(400))
    finally:
        server.stop()
    return [json.loads((folder / f"tp{rank}-load.json").read_text()) for rank in range(verified.tp)]
