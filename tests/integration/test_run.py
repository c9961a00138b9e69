"""Whole runs: they finish, and killing, stopping or starving them does what README and issue say.

Sampling is seeded, so one finished run is the reference for every run that is disturbed: the disturbance must not show in the metrics.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny import make_tiny_model
from tiny_runs import Run, metrics, overrides, started, write_data

pytestmark = pytest.mark.timeout(1800)  # a busy machine needs minutes for a server's start alone
STEPS = 5
NOT_COMPARED = ("time/", "memory/", "eval/")
# The list, in full.
NAMES = """
step update reward/mean accuracy/mean response/length_mean response/length_max response/truncated tokens/trained tokens/generated
sampling/groups_sampled sampling/groups_accepted sampling/all_correct sampling/all_wrong sampling/carried sampling/aborted
policy/loss policy/grad_norm policy/entropy policy/clip_low policy/clip_high policy/kl_old policy/rollout_logprob_gap
time/rollout time/reward time/old_logprobs time/update time/sync time/checkpoint time/step memory/rss lr
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> SimpleNamespace:
    """A tiny model and data for all runs of this file."""
    folder = tmp_path_factory.mktemp("runs")
    model = make_tiny_model(folder / "model", tied=True, max_positions=1024)
    return SimpleNamespace(folder=folder, model=model, data=write_data(folder / "data"))


@pytest.fixture(scope="session")
def finished(place) -> SimpleNamespace:
    """A run of STEPS steps that nothing disturbed, with an evaluation at the beginning and the end."""
    run_dir = place.folder / "finished"
    held_out = place.folder / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": f"{i}-1=", "answer": str(i - 1)}) + "\n" for i in range(6)))
    extra = {"evaluation__path": held_out, "evaluation__every_steps": STEPS, "checkpoint__every_steps": 1}
    arguments = overrides(place.model, place.data, run_dir, run__max_steps=STEPS, **extra)
    with started(arguments, place.data, place.folder / "finished.log") as run:
        status = run.wait()
        gone = run.all_gone()
    return SimpleNamespace(run_dir=run_dir, status=status, gone=gone, log=run.text, metrics=metrics(run_dir), held_out=held_out)


def compared(line: dict) -> dict:
    return {name: value for name, value in line.items() if not name.startswith(NOT_COMPARED)}


def assert_steps_equal(run_dir: Path, finished: SimpleNamespace, steps: range) -> None:
    """Bit for bit, sampled tokens included."""
    mine = {line["step"]: line for line in metrics(run_dir)}
    reference = {line["step"]: line for line in finished.metrics}
    for step in steps:
        assert compared(mine[step]) == compared(reference[step]), f"step {step}"
        name = f"rollouts/step_{step:06d}.jsonl.zst"
        assert groups(run_dir / name) == groups(finished.run_dir / name), f"rollouts of step {step}"


def groups(path: Path) -> list:
    from megatron_dapo.report.rollouts import load_groups

    return load_groups(path)[0]


def resume(place: SimpleNamespace, run_dir: Path, log: str, **values) -> Run:
    values = {"run__max_steps": STEPS, "checkpoint__every_steps": 1, "checkpoint__keep": STEPS} | values
    env = {"DAPO_TEST_HOLD": values.pop("hold")} if "hold" in values else {}
    return started(overrides(place.model, place.data, run_dir, **values), place.data, place.folder / log, **env)


# --- the undisturbed run -------------------------------------------------------------------------------------------------


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
        trained = groups(finished.run_dir / f"rollouts/step_{number:06d}.jsonl.zst")
        completions = [completion for group in trained for completion in group.completions]
        lengths = [len(completion.tokens) for completion in completions]
        assert line["tokens/trained"] == sum(lengths)
        assert line["response/length_mean"] == pytest.approx(sum(lengths) / 16)
        assert line["response/truncated"] == sum(c.finish_reason == "length" for c in completions) / 16
        assert line["reward/mean"] == pytest.approx(sum(r for group in trained for r in group.rewards) / 16)
        assert line["lr"] == 0.003 and line["policy/grad_norm"] > 0.1 and line["policy/entropy"] > 1
        assert line["policy/kl_old"] == line["policy/clip_low"] == line["policy/clip_high"] == 0  # one update: ratio 1
        sampling = {name.removeprefix("sampling/"): value for name, value in line.items() if name.startswith("sampling/")}
        came = sampling["groups_sampled"] + sampling["carried"]
        assert came == sum(
            sampling[name]
            for name in ("groups_accepted", "all_correct", "all_wrong", "outside_window", "carried_over", "surplus_dropped")
        )
        stages = [line[f"time/{stage}"] for stage in ("rollout", "old_logprobs", "update", "sync", "checkpoint")]
        assert sum(stages) <= line["time/step"] <= sum(stages) + 2
    evaluated = [line["step"] for line in finished.metrics if "eval/accuracy" in line]
    assert evaluated == [0, STEPS]


def test_engine_and_policy_agree_on_fresh_samples(finished):
    for line in finished.metrics[1:]:
        assert 0 < line["policy/rollout_logprob_gap"] < 1e-4
        assert line["policy/rollout_logprob_gap_max"] < 1e-3
    assert finished.metrics[1]["policy/fresh_tokens"] == 1


def test_saved_rollouts_are_what_was_trained_on(finished):
    seen: set[int] = set()
    for step in range(1, STEPS + 1):
        trained = groups(finished.run_dir / f"rollouts/step_{step:06d}.jsonl.zst")
        assert len(trained) == 4 and all(len(group.completions) == 4 for group in trained)
        positions = [group.prompt.position for group in trained]
        assert positions == sorted(positions) and not seen & set(positions)
        seen |= set(positions)
        for group in trained:
            assert 0 < group.accuracy < 1
            assert list(group.correct) == [sum(map(ord, c.text)) % 3 == 0 for c in group.completions]
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
        assert (after[name] - before[name]).abs().max() <= 1.5 * STEPS * 0.003  # Adam moves at most about lr an update
    assert AutoTokenizer.from_pretrained(finished.run_dir / "hf")("1+1=")["input_ids"]


# --- stopped, killed, resumed --------------------------------------------------------------------------------------------


def test_stopped_then_killed_a_run_resumes_exactly(finished, place):
    """SIGTERM in the middle of step 2; resumed, kill -9 of the launcher in the middle of step 3; resumed: nothing shows."""
    run_dir = place.folder / "disturbed"
    with resume(place, run_dir, "disturbed_1.log", hold=f"{run_dir} 1") as run:
        run.until((run_dir / "held").exists)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(120) == 0, run.text
        assert run.all_gone()
        assert "stopped after step 1; resume with" in run.text and "checkpoint.resume=auto" in run.text
        assert "Traceback" not in run.text
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000001"]

    (run_dir / "held").unlink()
    with resume(place, run_dir, "disturbed_2.log", hold=f"{run_dir} 2") as run:
        run.until((run_dir / "held").exists)
        assert len(run.named("vllm.entrypoints")) == 1 and len(run.named("megatron_dapo.train")) == 3
        run.process.kill()  # the launcher alone: ranks, engines and grading workers must end by themselves
        run.process.wait()
        assert run.all_gone()
    assert [line["step"] for line in metrics(run_dir)] == [1, 2]

    with resume(place, run_dir, "disturbed_3.log") as run:
        assert run.wait() == 0, run.text
        assert "step_000002" in run.text
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4, 5]
    assert_steps_equal(run_dir, finished, range(1, STEPS + 1))


@pytest.mark.slow
def test_kill_9_of_every_process_resumes_exactly(finished, place):
    run_dir = place.folder / "killed"
    with resume(place, run_dir, "killed_1.log", hold=f"{run_dir} 2") as run:
        run.until((run_dir / "held").exists)
        run.kill()
    with resume(place, run_dir, "killed_2.log") as run:
        assert run.wait() == 0, run.text
    assert_steps_equal(run_dir, finished, range(1, STEPS + 1))


@pytest.mark.slow
def test_kill_9_while_saving_leaves_the_previous_checkpoint(finished, place):
    """Killed as soon as the temporary folder of the second checkpoint is there."""
    run_dir = place.folder / "killed_saving"
    with resume(place, run_dir, "saving_1.log") as run:
        run.until((run_dir / "checkpoints" / "step_000002.tmp").exists)
        run.kill()
    assert (run_dir / "checkpoints" / "step_000001" / "run.pt").exists()
    with resume(place, run_dir, "saving_2.log") as run:
        assert run.wait() == 0, run.text
    assert_steps_equal(run_dir, finished, range(1, STEPS + 1))


def test_an_engine_killed_while_it_generates_is_replaced_and_ctrl_c_leaves_nothing(finished, place):
    run_dir = place.folder / "engine_killed"
    with resume(place, run_dir, "engine_killed.log", run__max_steps=1000) as run:
        run.until(lambda: run.named("vllm.entrypoints"))
        run.until(lambda: metrics(run_dir))
        kill_engine(run)
        run.until(lambda: metrics(run_dir)[-1]["step"] >= 3)
        assert "engine 0 was restarted" in run.text
        assert_steps_equal(run_dir, finished, range(1, 4))

        os.killpg(run.process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C: to the launcher and to every rank
        assert run.wait(120) == 0, run.text
        assert run.all_gone()
        assert "SIGINT" in run.text and "resume with" in run.text and "Traceback" not in run.text
    last = metrics(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step_{last:06d}" / "run.pt").exists()


def kill_engine(run: Run) -> None:
    """kill -9 of a vLLM server in the middle of a generation: its workers are frozen first, so that requests are open."""
    [server] = run.named("vllm.entrypoints")
    for child in server.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.suspend()
    time.sleep(1.0)
    server.kill()


@pytest.mark.slow
def test_an_engine_killed_between_generation_and_push(finished, place):
    """Step 2 is sampled in one wave, and held in grading while its engine dies: the death shows in the push after the update."""
    run_dir = place.folder / "push_killed"
    with resume(place, run_dir, "push_killed.log", hold=f"{run_dir} 1") as run:
        run.until((run_dir / "held").exists)
        time.sleep(5)  # the whole wave
        run.named("vllm.entrypoints")[0].kill()
        (run_dir / "release").touch()
        assert run.wait() == 0, run.text
        assert "an engine died while the weights were pushed" in run.text and "engine 0 was restarted" in run.text
    assert_steps_equal(run_dir, finished, range(1, STEPS + 1))


@pytest.mark.slow
def test_engines_that_keep_dying_end_the_run_with_its_checkpoint(place):
    run_dir = place.folder / "dying"
    with resume(place, run_dir, "dying.log", rollout__max_restarts=0, run__max_steps=1000) as run:
        run.until(lambda: metrics(run_dir))
        kill_engine(run)
        assert run.wait(120) == 1
        assert run.all_gone()
        assert "rollout.max_restarts=0 is used up" in run.text and "Traceback" not in run.text
    last = metrics(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step_{last:06d}" / "run.pt").exists()


# --- runs that can not go on ---------------------------------------------------------------------------------------------


def test_an_engine_that_cannot_start_ends_the_run_with_its_words(place):
    run_dir = place.folder / "no_engine"
    arguments = overrides(place.model, place.data, run_dir, **{"rollout__extra_args": "[--no-such-flag]"})
    with started(arguments, place.data, place.folder / "no_engine.log") as run:
        assert run.wait(300) == 1
        assert run.all_gone()
    assert "unrecognized arguments: --no-such-flag" in run.text and "engine_0.log" in run.text
    assert "Traceback" not in run.text


def test_a_loss_that_is_not_finite_ends_the_run_with_its_batch(place):
    """A learning rate of 1e30 makes the second update of the first step overflow."""
    run_dir = place.folder / "overflow"
    arguments = overrides(place.model, place.data, run_dir, optimizer__lr=1e30, batch__updates_per_step=2)
    with started(arguments, place.data, place.folder / "overflow.log") as run:
        assert run.wait() == 1
        assert run.all_gone()
    assert "nan" in run.text or "inf" in run.text
    assert "Traceback" not in run.text
    assert "failed_batch_step_000001.pt" in run.text
    batch = torch.load(run_dir / "failed_batch_step_000001.pt", weights_only=False)
    assert len(batch.mini_batches) == 2 and len(batch.lengths) == 16
    assert not (run_dir / "hf").exists() and not metrics(run_dir)


# --- bad input: one line, exit code 2, nothing started -------------------------------------------------------------------


def gpt2(folder: Path) -> Path:
    (folder / "gpt2").mkdir(exist_ok=True)
    (folder / "gpt2" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    (folder / "gpt2" / "tokenizer.json").write_text("{}")
    return folder / "gpt2"


def without_tokenizer(place: SimpleNamespace) -> Path:
    folder = place.folder / "no_tokenizer"
    if not folder.exists():
        shutil.copytree(place.model, folder, ignore=shutil.ignore_patterns("token*"))
    return folder


def malformed(folder: Path) -> Path:
    path = folder / "malformed.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", "answer": "4"}\n{"prompt": "3+3=", "answ')
    return path


def command(place: SimpleNamespace, *more: str, **values) -> subprocess.CompletedProcess:
    """Run the command line to its end; the run folder is new, so that what was written shows."""
    run_dir = place.folder / "refused"
    assert not run_dir.exists()
    arguments = overrides(place.model, place.data, run_dir, **values)
    env = os.environ | {"PYTHONPATH": str(place.data.parent)}
    line = [sys.executable, "-m", "megatron_dapo.train", *arguments, *more]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer__learning_rate": "1"}, ["unknown key optimizer.learning_rate", "optimizer."]),
        ({"data__path": "no/such.jsonl"}, ["data.path=no/such.jsonl does not exist"]),
        ({"data__path": lambda place: malformed(place.folder)}, ["malformed.jsonl, line 3"]),
        ({"model__path": lambda place: gpt2(place.folder)}, ["GPT2LMHeadModel", "Qwen2ForCausalLM", "LlamaForCausalLM"]),
        ({"model__path": without_tokenizer}, ["no tokenizer"]),
        ({"layout__tensor_parallel": "3"}, ["layout.tensor_parallel=3", "4 attention heads", "[1, 2, 4]"]),
        ({"layout__pipeline_parallel": "3"}, ["layout.pipeline_parallel=3", "2 layers"]),
        ({"layout__data_parallel": "3"}, ["16 samples", "layout.data_parallel=3"]),
        ({"reward__verifier": "dapo_test_verifiers:fourth"}, ["dapo_test_verifiers has no function 'fourth'"]),
        ({"rollout__base_port": "busy"}, ["rollout.base_port={port}", "port {port} for engine 0"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_starts(place, values, words):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        values = {name: port if value == "busy" else value for name, value in values.items()}
        result = command(place, **{name: value(place) if callable(value) else value for name, value in values.items()})
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word.format(port=port) in lines[0]
    assert not (place.folder / "refused").exists()


def test_a_dry_run_prints_and_starts_nothing(place):
    from megatron_dapo.config import RunConfig

    result = command(place, "--dry-run", layout__tensor_parallel=2, sampling__max_age=3)
    assert result.returncode == 0, result.stderr
    assert "4 policy ranks" in result.stdout and "1 vLLM servers" in result.stdout and "tp2 x pp1 x dp2" in result.stdout
    resolved = place.folder / "resolved.yaml"
    resolved.write_text(result.stdout)
    assert RunConfig.load(resolved).sampling.max_age == 3
    assert not (place.folder / "refused").exists()


# --- the Python API ------------------------------------------------------------------------------------------------------

SCRIPT = """
from megatron_dapo import DAPOTrainer

# No __main__ guard: the ranks must not run this file again.
print("script starts")
rows = [{{"prompt": f"{{i}}+1=", "answer": str(i + 1)}} for i in range(20)]
trainer = DAPOTrainer(
    model_name={model!r}, clip_epsilon=0.2, dynamic_sampling=True, max_length=8,
    overrides={{
        "model.dtype": "fp32", "run.dir": {run_dir!r}, "run.max_steps": 1, "sampling.prompts_per_step": 2,
        "sampling.samples_per_prompt": 4, "layout.data_parallel": 2, "data.max_prompt_tokens": 16,
        "reward.verifier": "dapo_test_verifiers:third",
    }},
)
print("returned", trainer.train(rows, epochs=1))
"""


def test_a_plain_script_trains(place):
    run_dir = place.folder / "script_run"
    script = place.folder / "script.py"
    script.write_text(SCRIPT.format(model=str(place.model), run_dir=str(run_dir)))
    with started([str(script)], place.data, place.folder / "script.log", module="") as run:
        assert run.wait() == 0, run.text
        assert run.all_gone()
    assert run.text.count("script starts") == 1
    assert f"returned {run_dir}" in run.text
    [line] = metrics(run_dir)
    assert line["update"] == 1 and line["policy/grad_norm"] > 0
    assert (run_dir / "hf" / "config.json").exists()
