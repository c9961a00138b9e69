"""A saved step is the step: floats bit for bit, and a damaged file is refused by name."""

from __future__ import annotations

import dataclasses
import json
import struct

import pytest
import zstandard
from support.samples import make_completion

from megatron_dapo.report.rollouts import load_groups, rollout_path, save_groups
from megatron_dapo.types import Group, Prompt

# a value that needs 9 digits, a denormal, a negative zero, an ordinary one
LOGPROBS = (-0.1 - 0.2, -1e-45, -0.0, -1.5)


def make_group(position: int, num_samples: int = 2) -> Group:
    prompt = Prompt(position=position, row=3, text='What is "½"?\n\ud800', answer="1", tokens=(1, 2, 3))
    completions = tuple(
        make_completion(
            (4, 5, 6, 7 + i),
            logprobs=LOGPROBS,
            finish_reason="length" if i else "stop",
            versions=((7 + position + i, 3), (9 + position + i, 1)),
            trained=[True, i == 0, True, True],
            number=i,
            seed=i or None,
        )
        for i in range(num_samples)
    )
    rewards = tuple(1.0 - i * 0.1 for i in range(num_samples))
    return Group(
        prompt=prompt,
        completions=completions,
        correct=tuple(i == 0 for i in range(num_samples)),
        rewards=rewards,
    )


def save(path, count: int = 3) -> list[Group]:
    groups = [make_group(position) for position in range(count)]
    save_groups(path, groups, step=3, meta={"model": "tiny"})
    return groups


def test_the_round_trip_is_exact(tmp_path):
    path = rollout_path(tmp_path, 3)
    assert path == tmp_path / "rollouts" / "step_000003.jsonl.zst"
    groups = save(path)
    loaded, header = load_groups(path)
    assert loaded == groups
    # == of numbers does not tell -0.0 from 0.0
    assert [g.completions[0].logprobs.tobytes() for g in loaded] == [struct.pack("<4f", *LOGPROBS)] * 3
    assert [g.completions[1].trained.tolist() for g in loaded] == [[True, False, True, True]] * 3
    assert loaded[0].completions[0].versions == ((7, 3), (9, 1))
    assert header == {
        "format": 2,
        "step": 3,
        "weight_version": 7,
        "num_groups": 3,
        "samples_per_prompt": 2,
        "meta": {"model": "tiny"},
    }
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_each_group_is_one_line_of_json(tmp_path):
    save(tmp_path / "a.zst")
    with zstandard.open(tmp_path / "a.zst", "rt") as file:
        header, *lines = [json.loads(line) for line in file]
    assert header["num_groups"] == len(lines) == 3
    fields = {field.name for field in dataclasses.fields(Group)}
    assert all(set(line) == fields for line in lines)


def test_no_group_and_uneven_groups(tmp_path):
    path = tmp_path / "a.zst"
    save_groups(path, [], step=0, meta={})
    assert load_groups(path)[0] == [] and load_groups(path)[1]["weight_version"] is None
    save_groups(path, [make_group(0, 2), make_group(1, 3)], step=0, meta={})
    assert load_groups(path)[1]["samples_per_prompt"] is None


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.zst"
    groups = save(path)
    with pytest.raises(TypeError):
        save_groups(path, groups[:1], step=4, meta={"bad": object()})
    assert load_groups(path)[0] == groups
    assert [p.name for p in tmp_path.iterdir()] == ["a.zst"]


def compressed(*lines: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(b"\n".join(lines))


def test_no_cut_goes_unnoticed(tmp_path):
    path = tmp_path / "a.zst"
    groups = save(path)
    whole = path.read_bytes()
    refused = 0
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        try:
            assert load_groups(path)[0] == groups  # only the checksum's last bytes are gone
        except ValueError:
            refused += 1
    assert refused >= len(whole) - 4


def test_no_changed_byte_goes_unnoticed(tmp_path):
    path = tmp_path / "a.zst"
    groups = save(path)
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :])
        try:
            assert load_groups(path)[0] == groups  # a byte of the frame header that does not matter
        except ValueError:
            refused += 1
    assert refused >= len(whole) - 4


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "a.zst"
    save(path)
    whole = path.read_bytes()
    with zstandard.open(path, "rb") as file:
        lines = file.read().split(b"\n")
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 0xFF
    damaged = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "flipped": bytes(flipped),
        "not zstandard": b"hello",
        "a group is missing": compressed(*lines[:-2], b""),
        "half a group": compressed(*lines[:-2], lines[-2][:50]),
        "no header": compressed(*lines[1:]),
        "later format": compressed(lines[0].replace(b'"format":2', b'"format":3'), *lines[1:]),
        "unknown field": compressed(lines[0], lines[1].replace(b'"row"', b'"line"'), *lines[2:]),
    }
    for name, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"rollout file .*a\.zst is cut short, corrupt or of another version"
        ):
            load_groups(path)
            pytest.fail(f"{name}: accepted")
    with pytest.raises(ValueError, match="no rollout file at .*other.zst"):
        load_groups(tmp_path / "other.zst")
