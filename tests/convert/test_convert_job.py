"""Conversions that are shared, cut off, resumed, refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.convert_runs import assert_bit_equal, weights

from megatron_dapo.convert import compare, workers, writer_lock
from megatron_dapo.convert.job import Conversion, Job, Share, count_nan
from megatron_dapo.convert.outputs import DTYPES
from megatron_dapo.errors import UserError

ENVIRONMENT = {"TORCHELASTIC_RUN_ID": "one", "WORLD_SIZE": "2"}


@pytest.fixture
def job(small_llama, tmp_path) -> Job:
    """Into a few files of each kind."""
    return Job(
        to="megatron", source=small_llama, hf_source=small_llama, out=tmp_path / "out", shard_bytes=6000
    )


def convert(job: Job, **arguments):
    return workers.convert(job, **({"environment": {}} | arguments))


def back(job: Job, model: Path) -> Path:
    """The result of `job` as a Hugging Face folder."""
    out = job.out.with_name("back")
    convert(Job(to="hf", source=job.out, hf_source=model, out=out))
    return out


def test_several_processes_share_the_files(job, small_llama):
    result = convert(job, workers=2)
    files = sorted(p.name for p in (job.out / "release").glob("__0_*.distcp"))
    assert result["files"] == len(files) - 1 > 4  # and one of objects without content
    assert_bit_equal(weights(back(job, small_llama)), weights(small_llama))
    assert not job.partial.exists() and not (job.out / ".convert").exists()


def test_ranks_of_a_launch_share_the_files(job, small_llama):
    assert convert(job, environment=ENVIRONMENT | {"RANK": "1"}) is None
    written = {p.name for p in (job.partial / "release").iterdir()}
    result = convert(job, environment=ENVIRONMENT | {"RANK": "0"})
    assert 0 < len(written) < result["files"]
    assert_bit_equal(weights(back(job, small_llama)), weights(small_llama))


def test_a_rank_without_files_is_waited_for_all_the_same(job):
    job = replace(job, shard_bytes=1 << 30)
    conversion = Conversion(job)
    os.close(conversion.start("one"))
    conversion.say_done(0, "one")
    assert not conversion.all_done(2, "one")
    conversion.say_done(1, "an earlier launch")
    assert not conversion.all_done(2, "one")
    conversion.say_done(1, "one")
    assert conversion.all_done(2, "one")


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_are_cast_as_torch_casts(job, small_llama, dtype):
    convert(replace(job, dtype=dtype))
    out = back(job, small_llama)
    assert_bit_equal(weights(out), {n: t.to(DTYPES[dtype]) for n, t in weights(small_llama).items()})
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(DTYPES[dtype]).removeprefix("torch.") and "torch_dtype" not in config


def test_what_is_finished_is_kept_and_what_is_damaged_written_anew(job, small_llama):
    begun = Conversion(job)
    os.close(begun.start(None))
    begun.write_share(Share(number=0, of=2), lambda _: None)
    folder = job.partial / "release"
    first, second, *_ = sorted(path for path in folder.iterdir())
    (folder / "__0_1.distcp.part").write_bytes(b"what a kill left")
    stamp = first.stat().st_mtime_ns
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1
    second.write_bytes(data)
    convert(job)
    assert (job.out / "release" / first.name).stat().st_mtime_ns == stamp
    assert_bit_equal(weights(back(job, small_llama)), weights(small_llama))


def test_the_beginning_of_another_conversion_is_not_continued(job, small_llama, tmp_path):
    os.close(Conversion(job).start(None))
    with pytest.raises(
        UserError, match=r"out\.partial is the beginning of another conversion \(dtype differ"
    ):
        convert(replace(job, dtype="bf16"))
    other = Path(shutil.copytree(small_llama, tmp_path / "other"))
    os.utime(other / "model.safetensors", ns=(1, 1))
    with pytest.raises(UserError, match=r"\(source, hf_source, source files differ\); delete it"):
        convert(replace(job, source=other, hf_source=other))


def test_a_target_that_exists_is_left_alone(job):
    job.out.mkdir()
    (job.out / "mine").write_text("kept")
    with pytest.raises(UserError, match=r"--out .*out exists; nothing is overwritten"):
        convert(job)
    assert [p.name for p in job.out.iterdir()] == ["mine"] and not job.partial.exists()
    (job.out / "mine").unlink()
    convert(job)  # an empty folder is none


def test_the_disk_is_checked_before_anything_is_written(job, monkeypatch):
    usage = shutil.disk_usage(job.out.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0\.07 GB more, its disk has 0\.00 GB free"):
        convert(job)
    assert not list((job.partial / "release").iterdir())


def test_a_disk_that_fills_up_while_writing(job, monkeypatch):
    def full(stream, names, pieces):
        raise OSError(28, "No space left on device")

    conversion = Conversion(job)
    os.close(conversion.start(None))
    monkeypatch.setattr(conversion._output, "write", full)
    with pytest.raises(UserError, match=r"__0_0\.distcp\.part cannot be written: No space.*start it again"):
        conversion.write_share(Share(), lambda _: None)
    assert not list((job.partial / "release").iterdir())


def test_types_that_do_not_fit_are_refused(job, small_llama, tmp_path):
    tensors = load_file(small_llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].half()
    model = Path(shutil.copytree(small_llama, tmp_path / "model"))
    save_file(tensors, model / "model.safetensors")
    job = replace(job, source=model, hf_source=model)
    with pytest.raises(UserError, match=rf"gate_proj\.weight, {name} are of different types"):
        convert(job)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(
        load_file(small_llama / "model.safetensors") | {name: tensors[name].to(torch.float8_e4m3fn)},
        model / "model.safetensors",
    )
    with pytest.raises(UserError, match=r"linear_fc2\.weight is torch\.float8_e4m3fn; only fp32, bf16, fp16"):
        convert(job)


def test_the_wrong_way_round(job, small_llama):
    with pytest.raises(UserError, match="is Hugging Face safetensors; give a Megatron checkpoint"):
        convert(replace(job, to="hf"))
    convert(job)
    back = replace(job, source=job.out, out=job.out.with_name("again"))
    with pytest.raises(UserError, match="is Megatron torch_dist; give a Hugging Face folder"):
        convert(back)


def test_nan_is_counted_and_refused_unless_allowed(job, small_llama, tmp_path):
    tensors = load_file(small_llama / "model.safetensors")
    tensors["model.norm.weight"][[3, 5]] = float("nan")
    tensors["lm_head.weight"][7, 1] = float("-inf")
    tensors["lm_head.weight"][7, 2] = float("inf")  # their sum is NaN, they are not
    model = Path(shutil.copytree(small_llama, tmp_path / "model"))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    job = replace(job, source=model, hf_source=model)
    with pytest.raises(
        UserError, match=r"NaN in 1 tensors: decoder\.final_layernorm\.weight \(2\).*--allow-nan"
    ):
        convert(job)
    assert not job.out.exists()
    result = convert(replace(job, allow_nan=True))  # nothing is written again
    assert result["nan"] == {"decoder.final_layernorm.weight": 2}
    assert compare.compare(job.out, model).equal


def test_count_nan():
    values = torch.tensor([1.0, float("inf"), float("nan"), float("nan"), float("-inf")])
    assert count_nan(values) == 2 and count_nan(values.bfloat16()) == 2
    assert count_nan(values[[0, 1, 4]]) == 0 and count_nan(torch.arange(3)) == 0


HOLD = "import sys; from pathlib import Path; from megatron_dapo.convert import writer_lock as l; "
HOLD += "l.take(Path(sys.argv[1]), None); print('held', flush=True); sys.stdin.read()"


def test_two_writers_at_once(job):
    os.close(Conversion(job).start(None))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(job.records / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"another conversion is writing to .*out\.partial; wait"):
            convert(job)
        other.kill()
    convert(job)  # the kernel gave the lock back


def test_a_launch_shares_its_lock(tmp_path):
    held = [writer_lock.take(tmp_path / "a" / "lock", "one") for _ in (tmp_path.joinpath("a").mkdir(), 1)]
    for launch in ("another", None):
        with pytest.raises(UserError, match="another conversion"):
            writer_lock.take(tmp_path / "a" / "lock", launch)
    for descriptor in held:
        os.close(descriptor)
    os.close(writer_lock.take(tmp_path / "a" / "lock", "another"))


def test_an_error_in_a_worker_process_is_one_line(job, small_llama, tmp_path):
    """The file is cut after the conversion has looked at it."""
    model = Path(shutil.copytree(small_llama, tmp_path / "model"))
    job = replace(job, source=model, hf_source=model)
    start = Conversion.start

    def cut(self, launch):
        lock = start(self, launch)
        file = model / "model.safetensors"
        os.truncate(file, file.stat().st_size - 100)
        return lock

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="is cut short: tensor"):
        patch.setattr(Conversion, "start", cut)
        convert(job, workers=2)
