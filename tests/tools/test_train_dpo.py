"""tools/train_dpo.py on two ranks: loss, gradient norm and margins of pairs from a file are those of DPO's
formula in float64, and a run that is resumed is the run that was not.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support import reference
from support.jobs_preferences import TOOL
from support.models import make_tiny_model, make_tokenizer
from support.ranks import run_ranks

from megatron_dapo.config import RunConfig
from megatron_dapo.data.preferences import PairStream, load_pairs
from megatron_dapo.errors import UserError
from megatron_dapo.objectives.dpo import best_and_worst

BETA, STEPS, PAIRS_A_STEP = 0.5, 2, 3
ROWS = [{"prompt": f"{i}*{i}=", "chosen": str(i * i), "rejected": "9" * (1 + i % 4)} for i in range(4, 11)]
ROWS.append({"prompt": "no", "chosen": "x" * 40, "rejected": "y"})  # too long


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> SimpleNamespace:
    """Two steps in `whole`; one, then the second, in `resumed`."""
    folder = tmp_path_factory.mktemp("dpo")
    models = [str(make_tiny_model(folder / f"model{seed}", seed=seed)) for seed in (0, 1)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = [
        f"model.path={models[0]}",
        "model.dtype=fp32",
        "run.device=cpu",
        "layout.data_parallel=2",
        "objective.kind=dpo",
        f"objective.beta={BETA}",
        f"objective.reference={models[1]}",
        f"data.path={folder / 'pairs.jsonl'}",
        "data.max_prompt_tokens=16",
        "rollout.max_tokens=32",
        "batch.max_tokens=64",
        f"sampling.prompts_per_step={PAIRS_A_STEP}",
        "sampling.samples_per_prompt=2",
        "optimizer.lr=0.003",
        "optimizer.eps=1e-4",
    ]
    dirs = SimpleNamespace(whole=folder / "whole", resumed=folder / "resumed")
    whole = [*common, f"run.dir={dirs.whole}", f"run.max_steps={STEPS}", "checkpoint.export_every=1"]
    first = [*common, f"run.dir={dirs.resumed}", "run.max_steps=1", "checkpoint.export_hf=false"]
    second = [*first, f"run.max_steps={STEPS}"]
    run_ranks("support.jobs_preferences:train", 2, runs=[whole, first, second])
    return SimpleNamespace(models=models, config=RunConfig.load(None, whole), **vars(dirs))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time/step"} for line in lines]


def expected(policy: str, frozen: str, samples: list[Any]) -> dict[str, float]:
    """-log sigmoid(beta (chosen - rejected)), a mean over pairs, in float64."""
    models, scores = [reference.load(folder) for folder in (policy, frozen)], []
    for sample in samples:
        mask = sample.response_mask[1:]
        now, then = (reference.logprobs(model, sample)[mask].sum() for model in models)
        scores.append(now - then.detach())
    chosen, rejected = scores[0::2], scores[1::2]
    margins = torch.stack([BETA * (c - r) for c, r in zip(chosen, rejected, strict=True)])
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    loss.backward()
    squares = [float(p.grad.square().sum()) for p in models[0].parameters() if p.grad is not None]
    return {
        "policy/loss": float(loss.detach()),
        "policy/grad_norm": math.sqrt(sum(squares)),
        "objective/margin": float(margins.mean().detach()),
        "objective/dpo_accuracy": float((margins > 0).double().mean()),
        "objective/chosen_logratio": float(torch.stack(chosen).mean().detach()),
        "tokens/trained": sum(int(sample.response_mask.sum()) for sample in samples),
    }


def test_two_updates_are_those_of_the_formula(runs):
    stream = PairStream(load_pairs(runs.config.data), make_tokenizer(), runs.config)
    weights = [runs.models[0], str(runs.whole / "exports" / "step_000001")]
    lines = metrics(runs.whole)
    assert [line["step"] for line in lines] == [1, 2]
    for line, folder in zip(lines, weights, strict=True):
        samples = best_and_worst(stream.next())
        assert len(samples) == 2 * PAIRS_A_STEP
        for name, value in expected(folder, runs.models[1], samples).items():
            assert line[name] == pytest.approx(value, rel=1e-4), (line["step"], name)
        assert line["data/passed_over_long"] == stream.num_long


def test_a_resumed_run_is_the_run_that_was_not(runs):
    assert metrics(runs.resumed) == metrics(runs.whole)


def test_the_run_ends_with_an_export(runs):
    first, last = (reference.load(path) for path in (runs.models[0], runs.whole / "hf"))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters(), strict=True))


# --- before any rank starts


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_dpo", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_cannot_be_trained_is_refused(tool, runs):
    base = [f"model.path={runs.models[0]}", "run.device=cpu", "model.dtype=fp32", "batch.max_tokens=600"]
    base += ["data.max_prompt_tokens=16", "rollout.max_tokens=32"]
    config = RunConfig.load(None, [*base, "objective.kind=dapo", "data.path=p.jsonl"])
    with pytest.raises(UserError, match=r"objective.kind=dapo does not train on pairs.*objective.kind=dpo"):
        tool.check(config)
    config = RunConfig.load(None, [*base, "objective.kind=dpo", "data.path=gone.jsonl"])
    with pytest.raises(UserError, match="data.path=gone.jsonl does not exist"):
        tool.check(config)
    long = [*base, "objective.kind=dpo", "rollout.max_tokens=550", "data.path=p.jsonl"]
    with pytest.raises(UserError, match="exceeds the model's 512 positions"):
        tool.check(RunConfig.load(None, long))


def test_a_refusal_is_one_line(tool, runs, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "run.yaml").write_text(runs.config.dump())
    assert tool.main([str(tmp_path / "run.yaml"), "data.path=gone.jsonl", f"run.dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.path=gone.jsonl") and error.count("\n") == 1


def test_ranks_start_with_the_configuration_of_the_run_folder(tool, runs, monkeypatch, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    started: list[Any] = []
    monkeypatch.setattr(tool, "start_ranks", lambda config, arguments: started.append(arguments) or 0)
    (tmp_path / "run.yaml").write_text(runs.config.dump())
    assert tool.main([str(tmp_path / "run.yaml"), f"run.dir={tmp_path / 'run'}"]) == 0
    [[script, file]] = started
    assert Path(script).name == "train_dpo.py"
    assert RunConfig.load(file).run.dir == str(tmp_path / "run")
