"""Another interpreter for the servers (rollout.python): it is tried once before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_dapo.errors import UserError
from megatron_dapo.rollout import interpreter
from megatron_dapo.rollout.interpreter import check_interpreter


def wrapper(folder: Path, *options: str) -> str:
    """A program that is the interpreter of these tests with more options."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {" ".join(options)} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_with_vllm_and_the_plugin_will_do(tmp_path):
    check_interpreter(wrapper(tmp_path))


@pytest.mark.parametrize("program", ["no/such/python", "no-such-python", "."])
def test_a_program_that_is_not_there_is_named(program):
    with pytest.raises(UserError, match=rf"rollout\.python={program} is no program.*whole path"):
        check_interpreter(program)


def test_an_interpreter_without_vllm_is_refused_with_its_own_words(tmp_path):
    with pytest.raises(UserError, match=r"No module named 'vllm'.*install vllm and megatron_dapo there"):
        check_interpreter(wrapper(tmp_path, "-I", "-S"))


def test_an_interpreter_whose_vllm_does_not_know_the_plugin_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(interpreter, "PLUGIN", "another_plugin")
    with pytest.raises(UserError, match=r"vLLM does not see this package as a plugin"):
        check_interpreter(wrapper(tmp_path))


def test_an_interpreter_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(interpreter, "TIMEOUT_S", 0.2)
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\nsleep 60\n")
    path.chmod(0o755)
    with pytest.raises(UserError, match=r"timed out after 0\.2 seconds"):
        check_interpreter(str(path))
