"""A saved step is the step: floats bit for bit, and a damaged file is refused by name."""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.samples import make_completion

from megatron_dapo.objectives.advantages import with_advantages
from megatron_dapo.report import rollouts
from megatron_dapo.report.rollouts import load_groups, rollout_path, save_groups
from megatron_dapo.report.step import source_metrics
from megatron_dapo.types import Collected, Completion, Group, GroupFacts, Prompt

# a value that needs 9 digits, a denormal, a negative zero, an ordinary one
LOGPROBS = (-0.1 - 0.2, -1e-45, -0.0, -1.5)


def make_group(position: int, num_samples: int = 2) -> Group:
    prompt = Prompt(
        position=position,
        row=3,
        text='What is "½"?\n\ud800',
        answer="1",
        tokens=(1, 2, 3),
        rule="choice" if position == 1 else None,
        source=None if position == 1 else f"\ud800{position}",
    )
    completions = tuple(
        make_completion(
            (4, 5, 6, 7 + i),
            logprobs=LOGPROBS,
            finish_reason="length" if i else "stop",
            versions=((7 + position + i, 3), (9 + position + i, 1)),
            trained=[True, i == 0, True, True],
            number=i,
            seed=i or None,
            reward_parts={} if position == 2 else {"verifier": 1.0 - i, "m:brief": -0.1 - 0.2 * i},
        )
        for i in range(num_samples)
    )
    rewards = tuple(1.0 - i * 0.1 for i in range(num_samples))
    return Group(
        prompt=prompt,
        completions=completions,
        correct=tuple((True, None, False)[i % 3] for i in range(num_samples)),
        rewards=rewards,
    )


def save(path, count: int = 3) -> list[Group]:
    groups = [make_group(position) for position in range(count)]
    save_groups(path, groups, step=3, meta={"model": "tiny"})
    return groups


def test_the_round_trip_is_exact(tmp_path):
    path = rollout_path(tmp_path, 3)
    assert path == tmp_path / "rollouts" / "step_000003.parquet"
    groups = save(path)
    loaded, header = load_groups(path)
    assert loaded == groups
    # == of numbers does not tell -0.0 from 0.0
    assert [g.completions[0].logprobs.tobytes() for g in loaded] == [struct.pack("<4f", *LOGPROBS)] * 3
    assert [g.completions[1].trained.tolist() for g in loaded] == [[True, False, True, True]] * 3
    assert loaded[0].completions[0].versions == ((7, 3), (9, 1))
    assert [c.seed for c in loaded[0].completions] == [None, 1]
    assert header == {
        "format": 4,
        "step": 3,
        "weight_version": 7,
        "num_groups": 3,
        "group_sizes": [2, 2, 2],
        "meta": {"model": "tiny"},
    }
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def of_format_3(path) -> None:
    """The file as it was written before rule, source and reward_parts."""
    table = pq.read_table(path).drop_columns(["rule", "source", "reward_parts"])
    header = table.schema.metadata[b"megatron_dapo"][8:].replace(b'"format": 4', b'"format": 3')
    pq.write_table(table.replace_schema_metadata({b"megatron_dapo": with_checksum(header)}), path)


def test_files_of_format_3_are_still_read(tmp_path):
    groups = save(tmp_path / "a.parquet")
    of_format_3(tmp_path / "a.parquet")
    loaded, header = load_groups(tmp_path / "a.parquet")
    assert header["format"] == 3
    without = [
        dataclasses.replace(
            group,
            prompt=dataclasses.replace(group.prompt, rule=None, source=None),
            completions=tuple(dataclasses.replace(c, reward_parts={}) for c in group.completions),
        )
        for group in groups
    ]
    assert loaded == without


def test_training_and_metrics_of_a_source_are_the_same_from_a_file(tmp_path):
    """Rewards that are normalised each (GDPO), and what is reported of each source."""
    groups = [group for group in (make_group(position, 3) for position in range(5)) if group.prompt.source]
    groups = [group for group in groups if group.completions[0].reward_parts]
    save_groups(tmp_path / "a.parquet", groups, step=3, meta={})
    loaded, _ = load_groups(tmp_path / "a.parquet")
    before, after = (
        [sample.advantages.tolist() for sample in with_advantages(some, each_reward=True)]
        for some in (groups, loaded)
    )
    assert before == after and len({tuple(values) for values in before}) > 2
    before, after = (
        source_metrics(
            Collected(
                groups=tuple(some),
                sampled=tuple(GroupFacts.of(group, "accepted") for group in some),
                counts={},
            )
        )
        for some in (groups, loaded)
    )
    assert before == after and f"source/\ud800{groups[0].prompt.position}/accuracy" in before


def test_any_reader_of_parquet_finds_one_row_a_completion(tmp_path):
    path = tmp_path / "a.parquet"
    save_groups(path, [make_group(5)], step=3, meta={})
    table = pq.read_table(path)
    assert table.select(["position", "number", "correct", "reward", "finish_reason"]).to_pylist() == [
        {"position": 5, "number": 0, "correct": True, "reward": 1.0, "finish_reason": "stop"},
        {"position": 5, "number": 1, "correct": None, "reward": 0.9, "finish_reason": "length"},
    ]
    assert table["tokens"].to_pylist() == [[4, 5, 6, 7], [4, 5, 6, 8]]
    assert table["reward_parts"].to_pylist()[1] == [("verifier", 0.0), ("m:brief", -0.1 - 0.2)]
    assert table["trained"].to_pylist() == [None, [True, False, True, True]]  # None: all
    assert table["version_tokens"].to_pylist() == [[3, 1], [3, 1]]


def test_a_mask_of_one_element_takes_no_memory_when_it_comes_back(tmp_path):
    """Every token trained, and none (overlong filtering)."""
    path = tmp_path / "a.parquet"
    completions = tuple(
        Completion(
            tokens=np.arange(4, dtype=np.int32),
            logprobs=np.zeros(4, dtype=np.float32),
            trained=np.broadcast_to(value, 4),
            finish_reason="stop",
            versions=((0, 4),),
        )
        for value in (np.True_, np.False_)
    )
    prompt = Prompt(position=0, row=0, text="a", answer="b", tokens=(1,))
    group = Group(prompt=prompt, completions=completions, correct=(True, False), rewards=(1.0, -1.0))
    save_groups(path, [group], step=0, meta={})
    loaded = load_groups(path)[0]
    assert loaded == [group]
    assert loaded[0].completions[0].trained.strides == (0,)


def test_groups_that_lie_across_the_pieces_of_a_file_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "ROWS", 4)
    groups = [make_group(position, size) for position, size in enumerate((3, 1, 6, 2))]
    save_groups(tmp_path / "a.parquet", groups, step=3, meta={})
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    assert load_groups(tmp_path / "a.parquet")[0] == groups


def test_no_group_and_uneven_groups(tmp_path):
    path = tmp_path / "a.parquet"
    save_groups(path, [], step=0, meta={})
    assert load_groups(path)[0] == [] and load_groups(path)[1]["weight_version"] is None
    groups = [make_group(0, 2), make_group(1, 3)]
    save_groups(path, groups, step=0, meta={})
    assert load_groups(path)[0] == groups and load_groups(path)[1]["group_sizes"] == [2, 3]


def test_a_token_takes_at_most_six_bytes(tmp_path):
    """Ids by Zipf's law over 150,000 (as independent draws, which no text is), and log-probabilities of which
    half are near 0 and none is on a grid.
    """
    draw = np.random.default_rng(0)
    ids = np.searchsorted(np.cumsum(1 / np.arange(1, 150_001)), draw.uniform(1, 12.4, 400_000))
    parts = lambda: {f"my_package.rewards:part_{i}": draw.random() for i in range(3)}  # noqa: E731
    near, spread = -np.exp(draw.uniform(-16, -2, ids.size)), -draw.exponential(1.2, ids.size)
    logprobs = np.where(draw.random(ids.size) < 0.5, near, spread)
    completions = [
        make_completion(tokens, logprobs=values, reward_parts=parts())
        for tokens, values in zip(np.split(ids, 80), np.split(logprobs, 80), strict=True)
    ]
    named = {"rule": "choice", "source": "gsm8k"}
    prompt = Prompt(position=0, row=0, text="a" * 500, answer="b", tokens=tuple(range(200)), **named)
    path = tmp_path / "a.parquet"
    group = Group(prompt=prompt, completions=tuple(completions), correct=(True,) * 80, rewards=(1.0,) * 80)
    save_groups(path, [group], step=0, meta={})
    assert path.stat().st_size < 6 * ids.size


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    groups = save(path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rollouts, "_encode", full)
    with pytest.raises(OSError, match="No space left"):
        save_groups(path, groups[:1], step=4, meta={})
    assert load_groups(path)[0] == groups
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_no_changed_byte_changes_what_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    groups = save(path)
    header = load_groups(path)[1]
    whole = path.read_bytes()
    places = range(0, len(whole), 3)
    refused = 0
    for place in places:
        flipped = whole[place] ^ 1 << place % 8
        path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        try:
            assert load_groups(path) == (groups, header)
        except ValueError:
            refused += 1
    assert refused > len(places) / 2


def test_no_cut_goes_unnoticed(tmp_path):
    path = tmp_path / "a.parquet"
    save(path)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 50), *range(len(whole) - 10, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is cut short"):
            load_groups(path)


def changed_metadata(path, change) -> bytes:
    """The file again, with other bytes under the key of the header."""
    table = pq.read_table(path)
    metadata = {b"megatron_dapo": change(table.schema.metadata[b"megatron_dapo"])}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({k: v for k, v in metadata.items() if v}), sink)
    return sink.getvalue().to_pybytes()


def with_checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text) + text


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    save(path)
    whole = path.read_bytes()
    sizes, other = b"[2, 2, 2]", pa.BufferOutputStream()
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "position", table["position"].cast(pa.int32())), other)
    damaged = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "not parquet": b"hello",
        "other columns": other.getvalue().to_pybytes(),
        "no header": changed_metadata(path, lambda value: b""),
        "changed header": changed_metadata(path, lambda value: value.replace(b"tiny", b"huge")),
        "a group is missing": changed_metadata(
            path, lambda value: with_checksum(value[8:].replace(sizes, b"[2, 2]"))
        ),
        "later format": changed_metadata(
            path, lambda value: with_checksum(value[8:].replace(b'"format": 4', b'"format": 5'))
        ),
    }
    for name, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"rollout file .*a\.parquet is cut short, corrupt or of another version"
        ):
            load_groups(path)
            pytest.fail(f"{name}: accepted")
    with pytest.raises(ValueError, match="no rollout file at .*other.parquet"):
        load_groups(tmp_path / "other.parquet")


def test_a_file_of_an_earlier_version_is_named(tmp_path):
    (tmp_path / "step_000003.jsonl.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"step_000003\.jsonl\.zst was written by an earlier version"):
        load_groups(tmp_path / "step_000003.parquet")


def test_the_header_is_readable_without_reading_the_rows(tmp_path):
    save(tmp_path / "a.parquet")
    metadata = pq.read_schema(tmp_path / "a.parquet").metadata[b"megatron_dapo"]
    assert json.loads(metadata[8:])["step"] == 3
