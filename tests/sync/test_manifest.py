"""A manifest survives JSON, gives views of the memory that it describes, and refuses what makes no sense."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from megatron_dapo.sync.manifest import FORMAT, Entry, Manifest

A = Entry(name="a", shape=(2, 3), offset=0)  # 24 bytes in fp32
B = Entry(name="b", shape=(4,), offset=64)


def make(**changed: Any) -> Manifest:
    values: dict[str, Any] = dict(version=7, path="/proc/1/fd/3", dtype="fp32", entries=(A, B))
    return Manifest(**(values | changed))


def as_json(**changed: Any) -> dict[str, Any]:
    return make().to_json() | changed


def entry(**changed: Any) -> Entry:
    return Entry(**({"name": "x", "shape": (2,), "offset": 128} | changed))


def test_what_is_sent():
    assert make().to_json() == {
        "format": FORMAT,
        "version": 7,
        "path": "/proc/1/fd/3",
        "dtype": "fp32",
        "entries": [{"name": "a", "shape": [2, 3], "offset": 0}, {"name": "b", "shape": [4], "offset": 64}],
    }


def test_what_is_received_is_what_was_sent():
    manifest = make(dtype="bf16", entries=(A, B, entry(name="scalar", shape=())))
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_views_share_the_memory():
    memory = bytearray(64 + 16)
    memory[0:24] = struct.pack("6f", *range(6))
    views = make().views(memory)
    assert views["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    views["b"][1] = 5.0
    assert struct.unpack_from("4f", memory, 64) == (0, 5, 0, 0)
    assert make().num_bytes == len(memory) and make(dtype="bf16").num_bytes == 64 + 8


def test_neighbours_and_any_order_are_no_overlap():
    make(entries=(entry(name="behind", offset=24), A))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"format": 2}, r"Manifest\.format=2 is unknown, this code reads 1.*same version of megatron_dapo"),
        ({"format": True}, r"Manifest\.format=True"),
        ({"version": -1}, r"Manifest\.version=-1 must be an integer of at least 0"),
        ({"version": "7"}, r"Manifest\.version='7'"),
        ({"path": ""}, r"Manifest\.path=''"),
        ({"path": None}, r"Manifest\.path=None"),
        ({"dtype": "fp16"}, r"Manifest\.dtype='fp16' is unknown; known: fp32, bf16"),
        ({"dtype": []}, r"Manifest\.dtype=\[\]"),
        ({"entries": (A, entry(name=""))}, r"Manifest\.entries\[1\]\.name=''"),
        ({"entries": (entry(shape=(2, 0)),)}, r"Manifest\.entries\[0\]\.shape=\(2, 0\) of 'x'"),
        ({"entries": (entry(shape=(-2,)),)}, r"Manifest\.entries\[0\]\.shape"),
        ({"entries": (entry(shape=(2.0,)),)}, r"Manifest\.entries\[0\]\.shape"),
        ({"entries": (A, entry(offset=-4))}, r"Manifest\.entries\[1\]\.offset=-4 of 'x'"),
        ({"entries": (entry(offset=6),)}, r"offset=6 of 'x' .* multiple of the 4 bytes"),
        ({"entries": (A, B, entry(name="a"))}, r"Manifest\.entries repeat the name 'a'"),
        ({"entries": (A, entry(offset=20))}, r"overlap: 'x' has offset 20, where 'a' ends only at byte 24"),
        ({"entries": (entry(offset=20), A)}, r"overlap: 'x' has offset 20"),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_field(changed, words):
    with pytest.raises(ValueError, match=words):
        make(**changed)
    if "entries" in changed:
        changed = {
            "entries": [
                {"name": e.name, "shape": list(e.shape), "offset": e.offset} for e in changed["entries"]
            ]
        }
    with pytest.raises(ValueError, match=words):
        Manifest.from_json(as_json(**changed))


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in as_json().items() if name != field}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "Manifest must be an object, got None"),
        ([1], "Manifest must be an object"),
        (without("format"), "Manifest lacks the field 'format'"),
        (without("version"), "Manifest lacks the field 'version'"),
        (as_json(tensors=[]), "Manifest has the unknown field 'tensors'"),
        (without("path") | {"format": 9}, r"Manifest\.format=9"),  # first: other formats have other fields
        (as_json(entries={}), r"Manifest\.entries must be a list"),
        (as_json(entries=[["a", [2], 0]]), r"Manifest\.entries\[0\] must be an object"),
        (as_json(entries=[{"name": "a", "shape": [2]}]), r"entries\[0\] lacks the field 'offset'"),
        (as_json(entries=[{"name": "a", "shape": 2, "offset": 0}]), r"entries\[0\]\.shape must be a list"),
    ],
)
def test_json_of_another_form_is_refused(value, words):
    with pytest.raises(ValueError, match=words):
        Manifest.from_json(value)
