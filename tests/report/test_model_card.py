"""README.md of an export."""

from __future__ import annotations

import json

import pytest
import yaml

from megatron_dapo.config import RunConfig
from megatron_dapo.report.model_card import hub_name, model_card


@pytest.fixture
def config() -> RunConfig:
    paths = ["model.path=owner/base", "data.path=/secret/data.jsonl", "run.dir=/secret/run"]
    return RunConfig.load(None, [*paths, "sampling.prompts_per_step=64", "optimizer.lr=3e-6"])


def test_the_metadata_is_what_the_hub_reads(config, tmp_path):
    _, head, _ = model_card(config, 12, tmp_path / "none").split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/base",
        "tags": ["reinforcement-learning", "dapo"],
    }


def test_the_configuration_is_in_it_and_no_path_of_the_machine(config, tmp_path):
    card = model_card(config, 12, tmp_path / "none")
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings["sampling"]["prompts_per_step"] == 64 and settings["optimizer"]["lr"] == 3e-6
    assert settings["objective"]["kind"] == "dapo"
    assert "secret" not in card and "Results" not in card


def test_results_are_the_first_and_the_last_up_to_the_step(config, tmp_path):
    lines = [
        {"step": 0, "eval/accuracy": 0.125},
        {"step": 1, "accuracy/mean": 0.25, "reward/mean": None},
        {"step": 2, "accuracy/mean": 0.5, "eval/accuracy": 0.375},
        {"step": 3, "accuracy/mean": 0.75},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = model_card(config, 2, file)
    assert "| held-out accuracy | 0.125 (step 0) | 0.375 (step 2) |" in card
    assert "| accuracy in training | 0.25 (step 1) | 0.5 (step 2) |" in card
    assert "| reward |" not in card


def test_a_folder_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "hf").mkdir(parents=True)
    assert hub_name("Qwen/Qwen2.5-32B") == hub_name("Qwen2.5-32B") == "Qwen/Qwen2.5-32B"
    assert hub_name("runs/hf") is hub_name(str(tmp_path)) is hub_name("model") is None
