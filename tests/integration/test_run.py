"""A whole run that nothing disturbs: its metrics, rollouts and export are what the documentation says."""

from __future__ import annotations

import asyncio

import pytest
import torch
from support.models import TOKEN
from support.runs import STEPS, groups
from support.servers import running

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.rollout.server import make_server

pytestmark = pytest.mark.timeout(1800)  # a busy machine needs minutes for a server's start alone
# What docs/metrics.md promises for every step.
NAMES = """
step update reward/mean accuracy/mean response/length_mean response/length_max response/truncated
tokens/trained tokens/generated sampling/groups_sampled sampling/groups_accepted sampling/all_correct
sampling/all_wrong sampling/carried sampling/aborted sampling/request_failures sampling/age_mean
tokens/wasted_all_wrong engines/idle_tail engines/idle_sync engines/idle_trainer engines/down
reward/correct reward/wrong reward/no_answer reward/timeout reward/crashed
policy/loss policy/grad_norm policy/entropy policy/clip_low policy/clip_high policy/clip_dual policy/kl_old
policy/rollout_logprob_gap policy/rollout_logprob_gap_max policy/fresh_tokens mismatch/ess
time/rollout time/rollouts_wait time/reward time/old_logprobs time/update time/sync time/checkpoint time/step
memory/rss lr
"""


def test_a_run_finishes_and_leaves_no_process(finished):
    assert finished.status == 0, finished.log
    assert finished.gone
    assert "Traceback" not in finished.log


def test_metrics_have_every_name_and_make_sense(finished):
    assert [line["step"] for line in finished.metrics] == [0, *range(1, STEPS + 1)]
    assert finished.metrics[0].keys() == {"step", "eval/accuracy"}
    for number, line in enumerate(finished.metrics[1:], start=1):
        assert not set(NAMES.split()) - line.keys()
        assert all(value is not None for value in line.values())
        assert line["update"] == number
        trained = groups(finished.run_dir / f"rollouts/step_{number:06d}.parquet")
        completions = [completion for group in trained for completion in group.completions]
        lengths = [len(completion.tokens) for completion in completions]
        assert line["tokens/trained"] == sum(lengths)
        assert line["response/length_mean"] == pytest.approx(sum(lengths) / 16)
        assert line["response/truncated"] == sum(c.finish_reason == "length" for c in completions) / 16
        assert line["reward/mean"] == pytest.approx(sum(r for group in trained for r in group.rewards) / 16)
        assert line["lr"] == 0.003 and line["policy/grad_norm"] > 0.1 and line["policy/entropy"] > 1
        assert (
            line["policy/kl_old"] == line["policy/clip_low"] == line["policy/clip_high"] == 0
        )  # one update: ratio 1
        sampling = {
            name.removeprefix("sampling/"): value
            for name, value in line.items()
            if name.startswith("sampling/")
        }
        came = sampling["groups_sampled"] + sampling["carried"]
        assert came == sum(
            sampling[name]
            for name in (
                "groups_accepted",
                "all_correct",
                "all_wrong",
                "outside_window",
                "carried_over",
                "surplus_dropped",
            )
        )
        stages = [
            line[f"time/{stage}"] for stage in ("rollout", "old_logprobs", "update", "sync", "checkpoint")
        ]
        assert sum(stages) <= line["time/step"] <= sum(stages) + 2
    evaluated = [line["step"] for line in finished.metrics if "eval/accuracy" in line]
    assert evaluated == [0, STEPS]


def test_engine_and_policy_agree_on_fresh_samples(finished):
    for line in finished.metrics[1:]:
        assert 0 < line["policy/rollout_logprob_gap"] < 1e-4
        assert line["policy/rollout_logprob_gap_max"] < 1e-3
    assert finished.metrics[1]["policy/fresh_tokens"] == 1


def test_saved_rollouts_are_what_was_trained_on(finished, place):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.model)
    seen: set[int] = set()
    for step in range(1, STEPS + 1):
        trained = groups(finished.run_dir / f"rollouts/step_{step:06d}.parquet")
        assert len(trained) == 4 and all(len(group.completions) == 4 for group in trained)
        positions = [group.prompt.position for group in trained]
        assert positions == sorted(positions) and not seen & set(positions)
        seen |= set(positions)
        for group in trained:
            assert 0 < group.accuracy < 1
            texts = tokenizer.batch_decode([c.tokens for c in group.completions], skip_special_tokens=True)
            assert list(group.correct) == [sum(map(ord, text)) % 3 == 0 for text in texts]
            assert step - 2 <= group.weight_version <= step - 1
            assert len({c.seed for c in group.completions}) == 4


def test_the_export_is_the_trained_model(finished, place):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished.run_dir / "hf", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32).state_dict()
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name in after:
        assert not torch.equal(after[name], before[name]), f"{name} did not change"
        assert (
            after[name] - before[name]
        ).abs().max() <= 1.5 * STEPS * 0.003  # Adam moves at most about lr an update
    assert AutoTokenizer.from_pretrained(finished.run_dir / "hf")("1+1=")["input_ids"]


@pytest.mark.slow
def test_a_server_loads_an_export_on_the_way(finished, tmp_path):
    """And answers as transformers does."""
    from transformers import AutoModelForCausalLM

    folder = max((finished.run_dir / "exports").iterdir())
    prompt = [10, 20, 30, 40]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    options = [
        f"model.path={folder}",
        f"run.dir={tmp_path}",
        "rollout.max_tokens=64",
        "data.max_prompt_tokens=64",
    ]
    config = RunConfig.load(None, [*options, "rollout.max_concurrency=8", "model.dtype=fp32"])
    with running(make_server(config, 0, folder, TOKEN, digests="", load_format="auto")) as server:
        tokens = asyncio.run(greedy(server.url, prompt, 8))
    assert tokens == expected.tolist()


async def greedy(url: str, prompt: list[int], count: int) -> list[int]:
    client = EngineClient(url, TOKEN)
    try:
        [answer] = await client.generate(prompt, n=1, max_tokens=count, temperature=0.0, weight_version=0)
        return answer.tokens.tolist()
    finally:
        await client.close()


def test_exports_on_the_way_are_whole_and_the_newest_stay(finished, place):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = sorted((finished.run_dir / "exports").iterdir())
    assert [path.name for path in folders] == [f"step_{step:06d}" for step in (STEPS - 2, STEPS - 1)]
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in folders)
    assert all(not torch.equal(before[name], after[name]) for name in after)
    assert AutoTokenizer.from_pretrained(folders[1])("1+1=")["input_ids"]
    assert (folders[1] / "generation_config.json").is_file()
    card = (finished.run_dir / "hf" / "README.md").read_text()
    accuracies = [line["eval/accuracy"] for line in finished.metrics if "eval/accuracy" in line]
    first, last = (f"{accuracy:.4g}" for accuracy in accuracies)
    assert f"| held-out accuracy | {first} (step 0) | {last} (step {STEPS}) |" in card
    assert str(place.folder) not in card
