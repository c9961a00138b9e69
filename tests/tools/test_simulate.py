"""The command line of tools/simulate.py: its JSON, comparisons, picture and refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from support.simulated_runs import make_config, make_profile, record

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "examples" / "configs" / "tiny.yaml")
KEYS = {
    "step_seconds",
    "rollout_seconds",
    "idle_share",
    "idle_by_cause",
    "tokens",
    "trained",
    "sequential",
    "age_histogram",
    "controller",
    "real_seconds",
}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("simulate_tool", ROOT / "tools" / "simulate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_object_with_every_key(tool, capsys):
    assert tool.main([TINY, "--steps", "2", "sampling.prompts_per_step=8", "--seed", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= KEYS
    assert result["idle_by_cause"].keys() == {"tail", "sync", "trainer"}
    assert result["tokens"].keys() >= {"generated", "trained", "wasted_by_reason"}
    assert result["trained"].keys() == {"groups", "mean_tokens", "share_by_pass_rate"}
    assert result["sequential"].keys() == {"mean_tokens", "share_by_pass_rate"}
    assert result["controller"].keys() >= {"cpu_seconds_per_step", "us_per_token", "peak_bytes"}
    assert result["trained"]["groups"] == 2 * 8
    assert sum(result["trained"]["share_by_pass_rate"].values()) == pytest.approx(1)
    assert result["controller"]["cpu_seconds_per_step"] > 0 and result["step_seconds"] > 0


def test_prompts_and_speeds_from_files(tool, tmp_path, capsys):
    prompts, speeds = tmp_path / "prompts.jsonl", tmp_path / "speed.json"
    prompts.write_text('{"pass_rate": 0.5, "median_tokens": 20, "sigma": 0.0, "wrong_longer": 1.0}\n')
    speeds.write_text(json.dumps({"tokens_per_second": {"1": 1000}, "sync_s": 7.0}))
    options = ["--steps", "1", "--prompts", str(prompts), "--engine-speed", str(speeds), "--engines", "2"]
    assert tool.main([TINY, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["trained"]["mean_tokens"] == 20 == result["sequential"]["mean_tokens"]
    assert result["trained"]["share_by_pass_rate"] == {"0.5": 1.0}
    assert result["sync_seconds"] == pytest.approx(7.0)


def test_comparison_and_its_picture(tool, tmp_path, capsys):
    import matplotlib.image

    out = tmp_path / "new" / "gantt.png"
    options = ["--steps", "1", "--compare", "rollout.engines=1,3", "--plot", str(out)]
    assert tool.main([TINY, *options]) == 0
    one, three = json.loads(capsys.readouterr().out)
    assert one["compare"] == {"key": "rollout.engines", "value": "1"}
    assert three["rollout_seconds"] < one["rollout_seconds"]
    assert [path.name for path in out.parent.iterdir()] == ["gantt.png"]
    pixels = matplotlib.image.imread(out)[:, :, :3]
    trainer = [int(tool.PHASE_COLOURS["trainer"][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    assert (abs(pixels - trainer).max(axis=2) < 0.02).sum() > 1000
    blue = (pixels[:, :, 2] > pixels[:, :, 0] + 0.2).sum()
    assert blue > 1000, "no engine is drawn"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of two engines and 8 steps."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(make_config().dump())
    record(folder, make_config(), make_profile(), steps=8)
    return folder


def test_a_run_is_simulated_again_and_otherwise(tool, run_dir, capsys):
    assert tool.main(["--from", str(run_dir), "--steps", "4"]) == 0
    same = json.loads(capsys.readouterr().out)
    assert same["trained"]["groups"] == 4 * 12
    assert same["calibration"]["engines"] == 2 and same["calibration"]["run"] == str(run_dir)
    assert same["calibration"]["numbers"]["sync_s"] == pytest.approx(0.25)
    assert len(same["sequential"]["share_by_pass_rate"]) == 4  # the run's rows, not the planned mixture's
    more = ["sampling.prompts_per_step=24", "sampling.max_age=1", "--engines", "4"]
    assert tool.main(["--from", str(run_dir), "--steps", "4", *more]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["trained"]["groups"] == 4 * 24 and other["age_histogram"].get("1", 0) > 0
    assert other["trainer_seconds"] > 1.5 * same["trainer_seconds"]


def test_a_run_and_another_configuration(tool, run_dir, tmp_path, capsys):
    """The file's sampling, the run's speeds but for those that are given."""
    speeds = tmp_path / "speed.json"
    speeds.write_text('{"sync_s": 3.0}')
    config = tmp_path / "other.yaml"
    config.write_text(make_config(sampling={"prompts_per_step": 5}).dump())
    options = ["--from", str(run_dir), "--steps", "1", "--engine-speed", str(speeds)]
    assert tool.main([str(config), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["trained"]["groups"] == 5 and result["sync_seconds"] == pytest.approx(3.0)


def test_colocated_engines_sleep_while_the_policy_trains(tool, capsys):
    options = [TINY, "--steps", "2", "sampling.prompts_per_step=8", "sampling.max_age=1"]
    assert tool.main(options) == 0
    apart = json.loads(capsys.readouterr().out)
    assert tool.main([*options, "--colocated"]) == 0
    together = json.loads(capsys.readouterr().out)
    assert apart["asleep_share"] == 0 and together["idle_by_cause"]["trainer"] == 0
    share = together["trainer_seconds"] / together["step_seconds"]
    assert together["asleep_share"] == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.path=elsewhere/other"], "no planned speeds for other"),
        (["sampling.prompts=3"], "unknown key sampling.prompts; did you mean sampling.max_prompts?"),
        (["--compare", "sampling.max_age"], "not of the form section.key=A,B"),
        (["--compare", "rollout.engines=1,2", "--engines", "4"], "take one of them out"),
        (["--prompts", "gone.jsonl"], "cannot read --prompts gone.jsonl"),
        (["--from", "gone"], "no configuration file at gone/config.yaml"),
    ],
)
def test_refusals_are_one_line(tool, capsys, arguments, message):
    assert tool.main([TINY, "--steps", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--engines", "0"], ["--plot", "a.jpg"], ["other.yaml"]]
)
def test_bad_options_end_at_once(tool, arguments):
    with pytest.raises(SystemExit):
        tool.main([TINY, *arguments])


def test_a_configuration_or_a_run_is_needed(tool):
    with pytest.raises(SystemExit):
        tool.main(["sampling.max_age=1"])
