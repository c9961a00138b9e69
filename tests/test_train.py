"""The command line: what it prints, what it returns, and which errors keep their traceback."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from setuptools import find_packages
from support.models import make_tiny_model

from megatron_dapo import DAPOTrainer, preflight, train
from megatron_dapo.errors import UserError
from megatron_dapo.policy.control import RankZeroLost

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> list[str]:
    """Overrides of a run that passes preflight."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "data.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    make_tiny_model(folder / "model")
    sizes = ["data.max_prompt_tokens=100", "rollout.max_tokens=100", "batch.max_tokens=200"]
    paths = [f"model.path={folder / 'model'}", f"data.path={folder / 'data.jsonl'}"]
    return [*paths, "model.dtype=fp32", "run.device=cpu", f"run.dir={folder / 'out'}", *sizes]


@pytest.fixture(autouse=True)
def outside_torchrun(monkeypatch):
    for name in ("RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch) -> list[Any]:
    """What would have been started as ranks; nothing is."""
    calls: list[Any] = []
    monkeypatch.setattr(train, "start_ranks", lambda config, arguments: calls.append(arguments) or 0)
    return calls


def test_a_dry_run_prints_and_starts_nothing(run, started, capsys):
    assert train.main([*run, "layout.data_parallel=2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "# layout: tp1 x pp1 x dp2 = 2 policy ranks" in text and "data_parallel: 2" in text
    assert started == []


def test_a_start_writes_the_configuration_for_its_ranks(run, started):
    assert train.main(run) == 0
    ((_, module, file),) = started
    assert module == "megatron_dapo.train"
    config = train.RunConfig.load(file)
    assert config == train.RunConfig.load(None, run) and file == f"{config.run.dir}/config.yaml"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lr=[1"], "error: cannot read override 'optimizer.lr=[1'"),  # reading
        (
            ["sampling.low=0.7", "sampling.high=0.3"],
            "error: sampling.low=0.7 leaves nothing",
        ),  # fields together
        (["layout.pipeline_parallel=3"], "error: layout.pipeline_parallel=3 (x virtual 1) does not divide"),
        (["data.path=no/such.jsonl"], "error: data.path=no/such.jsonl does not exist"),
        (["run.dir=/dev/null/run"], "error: run.dir='/dev/null/run' cannot be written"),
        (['run.dir="a\\0b"'], "error: run.dir='a\\x00b' cannot be written"),
    ],
)
def test_an_error_of_the_user_is_one_line(run, started, capsys, overrides, words):
    assert train.main([*run, *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith(words) and error.count("\n") == 1
    assert started == []


def test_a_row_nested_thousands_deep_is_one_line(run, started, capsys, tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"prompt": ' + "[" * 5000 + "]" * 5000 + ', "answer": "1"}\n')
    assert train.main([*run, f"data.path={path}"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: {path}, line 1: not a JSON object on one line") and error.count("\n") == 1
    )


def test_a_fault_of_the_code_keeps_its_traceback(run, started, monkeypatch):
    def fails(config: Any, deep: bool) -> None:
        raise ValueError("a fault inside torch")

    monkeypatch.setattr(preflight, "check", fails)
    with pytest.raises(ValueError, match="a fault inside torch"):
        train.main(run)


# --- under torchrun ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "run_id", "checks"), [("0", "somebody's", 1), ("1", "somebody's", 0), ("0", train.RUN_ID, 0)]
)
def test_rank_0_checks_unless_the_launcher_did(run, monkeypatch, rank, run_id, checks):
    checked = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setattr(preflight, "check", lambda config, deep: checked.append(config))
    monkeypatch.setattr(train, "run_rank", lambda config: 0)
    assert train.main(run) == 0
    assert len(checked) == checks


@pytest.mark.parametrize(
    ("rank", "local", "lines"), [("0", "0", 1), ("1", "1", 0), ("8", "0", 1), ("9", "1", 0)]
)
def test_one_rank_of_each_host_says_what_is_wrong_there(run, monkeypatch, capsys, rank, local, lines):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert train.main([*run, "optimizer.rl=1"]) == 2
    assert capsys.readouterr().err.count("\n") == lines


class FakeSession:
    """policy/session.py with a lifeline, or without; `lost` is what it will have noticed by the time."""

    def __init__(self, lost: bool, has_lifeline: bool = True) -> None:
        self.lost, self.has_lifeline = lost, has_lifeline
        self.left: list[str | None] = []

    def start(self, layout: Any, backend: Any, remedy: str) -> None:
        self.remedy = remedy

    def settle(self, timeout_s: float) -> bool:
        return self.lost

    def leave(self, failure: str | None = None) -> bool:
        self.left.append(failure)
        return self.has_lifeline

    def stop(self) -> None:
        self.left.append("stop")


@pytest.fixture
def run_rank_with(run, monkeypatch):
    """Call `run_rank` as rank `rank`, the first of its host, with a trainer that raises `error`."""

    def call(rank: str, error: BaseException | None, session: FakeSession | None = None) -> int:
        class Trainer:
            def __init__(self, config: Any, backend: Any) -> None:
                pass

            def run(self) -> None:
                if error:
                    raise error

        session = session or FakeSession(lost=False)
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", str(int(rank) % 8))
        monkeypatch.setattr(train.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
        monkeypatch.setattr(train.signal, "signal", lambda *_: None)
        monkeypatch.setattr(train, "prepare_device", lambda config: True)
        for name, content in {
            "trainer": SimpleNamespace(Trainer=Trainer),
            "policy.session": session,
            "policy.backend": SimpleNamespace(backend_of=lambda on_cpu: None),
        }.items():
            monkeypatch.setitem(sys.modules, f"megatron_dapo.{name}", content)
        monkeypatch.setattr("megatron_dapo.policy.session", session, raising=False)
        return train.run_rank(train.RunConfig.load(None, run))

    return call


def test_a_rank_that_has_finished_says_goodbye(run_rank_with):
    session = FakeSession(lost=False)
    assert run_rank_with("1", None, session) == 0
    assert session.left == ["stop"]


@pytest.mark.parametrize("rank", ["0", "1", "8"])
def test_a_users_error_is_printed_by_rank_0_and_told_to_it(run_rank_with, capsys, rank):
    session = FakeSession(lost=False)
    assert run_rank_with(rank, UserError("lower the learning rate"), session) == 1
    assert session.left == ["lower the learning rate"]
    assert capsys.readouterr().err == ("error: lower the learning rate\n" if rank == "0" else "")


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0), ("8", 1), ("9", 0)])
def test_without_a_lifeline_one_rank_of_each_host_prints_it(run_rank_with, capsys, rank, lines):
    session = FakeSession(lost=False, has_lifeline=False)
    assert run_rank_with(rank, UserError("lower the learning rate"), session) == 1
    assert capsys.readouterr().err.count("error: lower the learning rate\n") == lines


def test_rank_1_speaks_where_the_store_is_gone_with_rank_0(run_rank_with, capsys):
    for rank, words in (("1", "error: rank 0 is gone\n"), ("2", "")):
        assert run_rank_with(rank, RankZeroLost("rank 0 is gone")) == 1
        assert capsys.readouterr().err == words
    assert run_rank_with("1", RankZeroLost("rank 0 is gone"), FakeSession(lost=True)) == 1
    assert capsys.readouterr().err == ""  # the lifeline has said it


class FormatError(BaseException):
    """Like Megatron's CheckpointException, no Exception."""


@pytest.mark.parametrize(
    "error", [ValueError("bare"), OSError("no space"), TimeoutError("late"), FormatError("v1")]
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_keeps_the_traceback_of_everything_else_and_tells_the_others(run_rank_with, rank, error):
    session = FakeSession(lost=False)
    with pytest.raises(type(error)):
        run_rank_with(rank, error, session)
    assert session.left == [f"{type(error).__name__}: {error}"]


LOST_PEER = [
    "Connection closed by peer [127.0.0.1]:4",
    "recv: Connection reset by peer",
    "[gloo/transport/tcp/pair.cc:534] writev [10.0.0.2]:4: Broken pipe",
    "Read error [10.0.0.2]:4: Connection timed out",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exited",
]


@pytest.mark.parametrize("words", LOST_PEER)
def test_a_rank_that_lost_another_leaves_the_word_to_the_lifeline(run_rank_with, capsys, words):
    for rank in ("0", "1"):
        session = FakeSession(lost=True)
        assert run_rank_with(rank, RuntimeError(words), session) == 1
        assert session.left == [None]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", LOST_PEER)
def test_a_link_between_two_living_ranks_is_an_error_of_both(run_rank_with, words):
    session = FakeSession(lost=False)
    assert run_rank_with("1", RuntimeError(words), session) == 1
    assert session.left == [f"RuntimeError: {words}"]  # rank 0 prints it
    with pytest.raises(RuntimeError):
        run_rank_with("0", RuntimeError(words))


def test_another_error_is_not_taken_for_a_lost_rank(run_rank_with):
    with pytest.raises(RuntimeError, match="shapes"):
        run_rank_with("1", RuntimeError("shapes differ"), FakeSession(lost=True))


@pytest.mark.parametrize(
    ("run_id", "words"),
    [
        (
            train.RUN_ID,
            "resume with: python -m megatron_dapo.train 'runs/my run/config.yaml' checkpoint.resume=",
        ),
        ("none", "resume with the same command on every host, with checkpoint.resume=auto"),
    ],
)
def test_the_command_that_resumes(run, monkeypatch, run_id, words):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    config = train.RunConfig.load(None, [*run, "run.dir=runs/my run"])
    assert train.how_to_resume(config).startswith(words)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_ranks_on_gpus_are_started_with_one_connection_to_the_device(run, monkeypatch, on_cpu):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setattr(preflight, "on_cpu", lambda config: on_cpu)
    found = []

    def launch(settings: Any, entry: str) -> Any:
        return lambda *arguments: found.append(train.os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", launch)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setitem(train.os.environ, name, "")  # what is set is undone afterwards
        monkeypatch.delitem(train.os.environ, name)
    assert train.start_ranks(train.RunConfig.load(None, run), ["x"]) == 0
    assert found == [None if on_cpu else "1"]


# --- the Python API ---------------------------------------------------------------------


def test_the_api_refuses_keys_values_and_what_does_not_go_together():
    for overrides, message in (
        ({"optimizer.rl": 1}, "unknown key optimizer.rl; did you mean optimizer.lr?"),
        ({"optimizer.lr": 0}, "optimizer.lr=0: Input should be greater than 0"),
        ({"sampling.low": 0.7, "sampling.high": 0.3}, "sampling.low=0.7 leaves nothing below"),
    ):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            DAPOTrainer("model", overrides=overrides)


def test_the_api_has_all_four_techniques_on():
    """Clip-higher, dynamic sampling, the token-level loss, overlong shaping (a fifth of the longest)."""
    config = DAPOTrainer("Qwen2.5-32B", clip_epsilon=0.2, dynamic_sampling=True, max_length=4096).config
    assert (config.objective.eps_low, config.objective.eps_high) == (0.2, 0.28)
    assert config.sampling.dynamic and config.objective.kind == "dapo"
    assert (config.reward.overlong_cache, config.reward.overlong_factor) == (819, 1.0)
    longer = DAPOTrainer("model", overrides={"rollout.max_tokens": 20480})
    assert longer.config.reward.overlong_cache == 4096
    assert DAPOTrainer("model", overrides={"reward.overlong_cache": 0}).config.reward.overlong_cache == 0


def test_dapo_is_another_name_of_the_package():
    """As a wheel or an editable install has it: both packages, and the same class."""
    import dapo
    import megatron_dapo

    assert dapo.DAPOTrainer is megatron_dapo.DAPOTrainer and dapo.RunConfig is megatron_dapo.RunConfig
    with pytest.raises(AttributeError, match="'dapo' has no attribute 'other'"):
        _ = dapo.other
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    include = pyproject["tool"]["setuptools"]["packages"]["find"]["include"]
    found = find_packages(str(ROOT), include=include)
    assert {"dapo", "megatron_dapo", "megatron_dapo.data"} <= set(found)
    assert {name.split(".")[0] for name in found} == {"dapo", "megatron_dapo"}


def test_the_api_takes_keys_of_a_section_inside_a_section():
    trainer = DAPOTrainer("model", overrides={"policy.fp8.recipe": "delayed", "policy.recompute": "full"})
    assert trainer.config.policy.fp8 is not None and trainer.config.policy.fp8.recipe == "delayed"
    assert trainer.config.policy.recompute == "full"


FORKING_RANK = """
import os, time
from megatron_dapo.train import die_with_parent
die_with_parent(os.getppid())
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


def test_what_a_killed_rank_has_forked_ends_with_it():
    """Megatron forks a writer for each checkpoint: it would wait for ever for a rank that was killed."""
    rank = subprocess.Popen([sys.executable, "-c", FORKING_RANK], stdout=subprocess.PIPE, text=True)
    assert rank.stdout
    child = psutil.Process(int(rank.stdout.readline()))
    rank.kill()
    rank.wait()
    rank.stdout.close()
    try:
        child.wait(5)
    except psutil.TimeoutExpired:
        child.kill()
        raise
