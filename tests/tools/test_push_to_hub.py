"""What is sent to the hub, seen by an API that stands in for it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "push_to_hub.py"


class FakeApi:
    """Notes every call; `refusal` is raised by the upload."""

    calls: list[tuple] = []
    refusal: Exception | None = None

    def create_repo(self, name, **options):
        self.calls.append(("create_repo", name, options))

    def create_branch(self, name, **options):
        self.calls.append(("create_branch", name, options))

    def upload_folder(self, **options):
        if self.refusal:
            raise self.refusal
        sent = sorted(path.name for path in options.pop("folder_path").iterdir())
        self.calls.append(("upload_folder", sent, options))
        return SimpleNamespace(commit_url="https://hub.example/owner/name/commit/1")


@pytest.fixture
def push(monkeypatch):
    """push(*arguments) -> exit status; the calls are in FakeApi.calls."""
    spec = importlib.util.spec_from_file_location("push_to_hub", SCRIPT)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(FakeApi, "refusal", None)

    def run(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *map(str, arguments)])
        return tool.main()

    return run


@pytest.fixture
def export(tmp_path) -> Path:
    folder = tmp_path / "exports" / "step_000012"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("# card")
    (folder / "model-00001.safetensors").write_bytes(b"weights")
    index = {"weight_map": {"a": "model-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


FILES = ["README.md", "config.json", "model-00001.safetensors", "model.safetensors.index.json"]


def test_a_folder_goes_up_as_it_is(push, export, capsys):
    assert push(export, "owner/name") == 0
    assert FakeApi.calls == [
        ("create_repo", "owner/name", {"private": False, "exist_ok": True}),
        (
            "upload_folder",
            FILES,
            {"repo_id": "owner/name", "revision": None, "commit_message": "Weights after 12 steps"},
        ),
    ]
    assert capsys.readouterr().out == "https://hub.example/owner/name/commit/1\n"


def test_a_branch_of_a_private_repository(push, export):
    assert push(export, "owner/name", "--private", "--revision", "step-12") == 0
    assert FakeApi.calls[0][2]["private"] is True
    assert FakeApi.calls[1] == ("create_branch", "owner/name", {"branch": "step-12", "exist_ok": True})
    assert FakeApi.calls[2][2]["revision"] == "step-12"


def test_a_dry_run_sends_nothing(push, export, capsys):
    assert push(export, "owner/name", "--dry-run") == 0
    assert FakeApi.calls == []
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == FILES


def test_a_folder_that_lacks_a_file_is_refused(push, export, capsys):
    (export / "model-00001.safetensors").unlink()
    assert push(export, "owner/name") == 1
    assert "lacks model-00001.safetensors, which its index names; export it again" in capsys.readouterr().err
    assert FakeApi.calls == []


def test_a_folder_that_is_no_export_is_refused(push, tmp_path, capsys):
    assert push(tmp_path, "owner/name") == 1
    assert "has no config.json; give a run's hf folder, or one of its exports" in capsys.readouterr().err


def test_what_the_hub_refuses_is_one_line(push, export, monkeypatch, capsys):
    monkeypatch.setattr(FakeApi, "refusal", PermissionError("403\nForbidden"))
    assert push(export, "owner/name") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "was not uploaded to owner/name: 403 Forbidden" in message
    assert "hf auth login" in message
