"""`tools/bench.py step`: what it measures and prints. The slow tests make real runs."""

from __future__ import annotations

import importlib
import random
from types import SimpleNamespace

import pytest
import torch
from support.samples import make_group, make_prompt

TIMES = ("reward", "rollout", "old_logprobs", "update", "sync", "checkpoint", "step")
PLAIN = {*(f"time/{name}" for name in TIMES), "tokens_per_step", "steps", "cores"}


def line(number: int, **seconds: float) -> dict[str, float]:
    times = {f"time/{name}": seconds.get(name, 0.0) for name in TIMES}
    return {"step": number, "tokens/generated": 5120.0, **times}


@pytest.fixture
def modules(bench):
    """The files of the benchmark, by name."""
    names = ("step", "runs", "updates", "padding")
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in names})


def test_strict_and_aged_in_one_report(bench, modules, monkeypatch):
    asked = []

    def run(config):
        asked.append(config)
        each = [3.0, 5.0, 4.0] if config.sampling.max_age == 0 else [2.0, 3.0, 2.5]
        return [line(number, step=seconds) for number, seconds in enumerate(each, 3)]

    monkeypatch.setattr(modules.runs, "run", run)
    report = bench("step", "--steps", "3", "--max-age", "1", "optimizer.lr=2e-6")
    assert report.keys() == {"strict", "aged", "max_age", "aged_over_strict"}
    assert report["strict"].keys() == report["aged"].keys() == PLAIN
    assert report["strict"]["time/step"] == 4.0 and report["aged"]["time/step"] == 2.5
    assert report["aged_over_strict"] == 0.625 and report["max_age"] == 1
    assert [config.sampling.max_age for config in asked] == [0, 1]
    assert asked[0].run.dir != asked[1].run.dir
    assert all(config.run.max_steps == 5 and config.optimizer.lr == 2e-6 for config in asked)


def test_plain_steps_are_strict(bench, modules, monkeypatch):
    asked = []
    monkeypatch.setattr(modules.runs, "run", lambda config: asked.append(config) or [line(3, step=2.0)])
    report = bench("step", "--steps", "1")
    assert report.keys() == PLAIN and report["time/step"] == 2.0 and report["steps"] == 1
    assert [config.sampling.max_age for config in asked] == [0]


def test_a_run_that_is_stopped_early(bench, modules, monkeypatch):
    monkeypatch.setattr(
        modules.runs, "launch", lambda config: 0
    )  # stopped by a signal before it wrote a line
    with pytest.raises(SystemExit, match="error: the run was stopped before step 3, the first"):
        bench("step", "--steps", "1")


def test_geometric_beside_padded(bench, modules, monkeypatch):
    prompt = make_prompt(0)
    lengths = [(10, 40), (20, 130)]
    groups = [make_group(prompt, lengths=pair) for pair in lengths]
    asked = []

    async def generate_padded(config, given):
        asked.append(config)
        assert given is groups
        return {"seconds": 8.0, "tokens": 520}

    steps = [line(3, step=5.0, rollout=2.0, update=2.9, sync=0.5)]
    monkeypatch.setattr(modules.runs, "run", lambda config: asked.append(config) or steps)
    measured = {"packed": 2.8, "padded": 6.5, "padded_tokens": 700}
    monkeypatch.setattr(modules.updates, "measure", lambda config, step: measured)
    monkeypatch.setattr(modules.step, "load_groups", lambda path: (groups, {}))
    monkeypatch.setattr(modules.step, "_generate_padded", generate_padded)
    monkeypatch.setattr(modules.step, "product_ceiling", lambda: 1e10)
    report = bench("step", "--steps", "1", "--lengths", "geometric")
    assert report["padded"] == {
        "step": 15.0,
        "generate": 8.0,
        "update": 6.5,
        "generated_tokens": 520,
        "trained_tokens": 700,
    }
    assert report["padded_over_step"] == 3.0 and report["update_alone"] == 2.8
    assert report["rollout_tokens_per_second"] == 2560.0 and report["longest"] == 130
    assert report["mean_length"] == 50.0
    in_all = 5120 + 4 * len(prompt.tokens)
    parameters = report["products"]["parameters"]
    assert 3.0e6 < parameters < 3.7e6
    assert report["products"]["rollout"] == pytest.approx(2 * parameters * in_all / 1e10, abs=1e-3)
    assert report["products"]["update"] == pytest.approx(6 * parameters * in_all / 1e10, abs=1e-3)
    run, padded = asked
    assert run.sampling.max_age == padded.sampling.max_age == 0
    assert run.rollout.max_tokens == padded.rollout.max_tokens == 512
    assert run.model.path != padded.model.path and run.report.rollouts


def test_the_long_tailed_model(modules, tmp_path):
    """One token in about 170 ends the response, whatever stands before it; the endless model has the same
    weights and no end.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    modules.runs.make_model(tmp_path / "ends", tokens=160, ends=True)
    modules.runs.make_model(tmp_path / "endless", tokens=160)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ends")
    assert len(tokenizer) == 160
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ends", dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(torch.randint(2, 160, (8, 64))).logits
    chances = logits.softmax(-1)[..., tokenizer.eos_token_id]
    assert 160 < float((1 / chances).mean()) < 180 and float(chances.std() / chances.mean()) < 0.05
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "endless", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert AutoConfig.from_pretrained(tmp_path / "ends").eos_token_id == tokenizer.eos_token_id
    assert AutoConfig.from_pretrained(tmp_path / "endless").eos_token_id is None
    assert other.generation_config.eos_token_id is None


def test_padded_micro_batches(modules):
    # two of 30 fill 60; with a third sample the micro-batch would have 90
    batch = modules.padding.padded_batch([10, 30, 5, 5], 60, random.Random(0))
    (mini,) = batch.mini_batches
    assert mini.micro_batches == (((0, 1), (2, 3)),)
    assert list(batch.lengths) == [30, 30, 5, 5]
    assert mini.num_tokens == (10 - 2) + (30 - 7) + 2 * (5 - 1)  # a quarter of each is prompt


def test_padded_micro_batches_of_two_ranks(modules):
    batch = modules.padding.padded_batch(
        [10, 30, 40, 5, 5, 5], 60, random.Random(0), prompts=[3] * 6, ranks=2
    )
    (mini,) = batch.mini_batches
    assert mini.micro_batches == (((0, 1), (2,)), ((3, 4, 5), ()))
    assert list(batch.lengths) == [30, 30, 40, 5, 5, 5]
    assert mini.num_tokens == 95 - 6 * 3


SMALL = ["sampling.prompts_per_step=2", "sampling.samples_per_prompt=2", "rollout.max_concurrency=4"]


@pytest.mark.slow
def test_real_steps_strict_and_aged(bench):
    report = bench("step", "--steps", "1", "--max-age", "1", *SMALL)
    assert report["strict"]["tokens_per_step"] == 2 * 2 * 20 and report["strict"]["steps"] == 1
    assert report["aged"]["time/update"] > 0 and report["aged_over_strict"] > 0


@pytest.mark.slow
def test_real_geometric_step(bench):
    report = bench("step", "--steps", "1", "--lengths", "geometric", *SMALL)
    longest, padded = report["longest"], report["padded"]
    assert padded["generated_tokens"] == 4 * longest  # all four sequences go on to the end of the longest
    assert report["trained_tokens"] < padded["trained_tokens"]
    assert padded["step"] > padded["generate"] > 0 and padded["update"] > 0 and report["update_alone"] > 0
