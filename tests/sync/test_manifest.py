"""A manifest survives JSON, and refuses what makes no sense."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from megatron_dapo.sync import manifest as manifest_file
from megatron_dapo.sync.manifest import FORMAT, Checksum, Manifest, Piece

A = Piece(sink=3, source=None, start=(4, 0), size=(2, 3), offset=0)
B = Piece(sink=None, source="b", start=(), size=(), offset=24)
# `printf '[[3,[4,0],[2,3],0],["b",[],[],24]]' | sha256sum`
DIGEST = "0faffa70c45e5e68ebddc0c6c550d415f773f6a98b23abd1c0aea42c26b97253"
SUM = Checksum(offset=0, num_bytes=28, xxh3="0123456789abcdef")


def make(**changed: Any) -> Manifest:
    values: dict[str, Any] = dict(
        version=7,
        table="af09",
        path="/proc/1/fd/3",
        offset=4096,
        num_bytes=28,
        dtype_whole="bfloat16",
        pieces=(A, B),
        checksums=(SUM,),
    )
    return Manifest(**(values | changed))


def as_json(**changed: Any) -> dict[str, Any]:
    return make().to_json() | changed


def piece(**changed: Any) -> Piece:
    return Piece(**({"sink": 1, "source": None, "start": (0,), "size": (2,), "offset": 8} | changed))


def test_what_is_sent():
    assert make().to_json() == {
        "format": FORMAT,
        "version": 7,
        "table": "af09",
        "path": "/proc/1/fd/3",
        "offset": 4096,
        "num_bytes": 28,
        "dtype_whole": "bfloat16",
        "pieces": [[3, [4, 0], [2, 3], 0], ["b", [], [], 24]],
        "digest": DIGEST,
        "checksums": [[0, 28, "0123456789abcdef"]],
    }


@pytest.mark.parametrize("manifest", [make(), make(checksums=()), make(num_bytes=0, pieces=(), checksums=())])
def test_what_is_received_is_what_was_sent(manifest):
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_a_brief_one_names_its_pieces_by_their_digest():
    brief = make().brief()
    assert brief.to_json() == make().to_json() | {"pieces": None}
    assert Manifest.from_json(json.loads(json.dumps(brief.to_json()))) == brief
    assert make(pieces=(B, A)).digest != make().digest == dataclasses.replace(make(), version=8).digest


@pytest.mark.parametrize("digest", ["", "AF", None, "0" * 63])
def test_pieces_or_a_digest_must_be_there(digest):
    with pytest.raises(ValueError, match=r"Manifest\.digest=.* must be 64 hexadecimal digits"):
        make(pieces=None, digest=digest)
    with pytest.raises(ValueError, match=r"Manifest\.digest=.* must be 64 hexadecimal digits"):
        Manifest.from_json(as_json(pieces=None, digest=digest))


def test_pieces_that_are_checked_already_are_not_checked_again(monkeypatch):
    manifest = make()
    monkeypatch.setattr(manifest_file, "_check_piece", None)
    assert dataclasses.replace(manifest, version=8, checksums=()).brief().digest == DIGEST


def test_checksums_of_several_messages():
    parts = [Checksum(offset=at, num_bytes=n, xxh3="0" * 16) for at, n in ((0, 8), (8, 20))]
    assert make(checksums=tuple(parts)).checksums[1].num_bytes == 20
    for wrong, words in [
        (parts[:1], r"Manifest\.checksums are of 8 of the chunk's 28 bytes"),
        (parts[1:], r"Manifest\.checksums\[0\]\.offset=8, .* go on at byte 0"),
        (parts[::-1], r"Manifest\.checksums\[0\]\.offset=8"),
    ]:
        with pytest.raises(ValueError, match=words):
            make(checksums=tuple(wrong))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"format": 1}, r"Manifest\.format=1 is unknown, this code reads 3.*same version of megatron_dapo"),
        ({"format": True}, r"Manifest\.format=True"),
        ({"version": -1}, r"Manifest\.version=-1 must be an integer of at least 0"),
        ({"version": "7"}, r"Manifest\.version='7'"),
        ({"table": ""}, r"Manifest\.table='' must be the digest"),
        ({"path": ""}, r"Manifest\.path=''"),
        ({"path": None}, r"Manifest\.path=None"),
        ({"offset": -1}, r"Manifest\.offset=-1"),
        ({"num_bytes": 1.5}, r"Manifest\.num_bytes=1\.5"),
        ({"dtype_whole": "bf16"}, r"Manifest\.dtype_whole='bf16' is no dtype of torch"),
        ({"dtype_whole": []}, r"Manifest\.dtype_whole=\[\]"),
        ({"pieces": (A, piece(sink=-1))}, r"Manifest\.pieces\[1\]\.sink=-1"),
        ({"pieces": (piece(sink=True),)}, r"Manifest\.pieces\[0\]\.sink=True"),
        ({"pieces": (piece(sink=None, source=""),)}, r"Manifest\.pieces\[0\]\.source=''"),
        (
            {"pieces": (piece(size=(0,)),)},
            r"Manifest\.pieces\[0\]\.size=\(0,\) must be integers of at least 1",
        ),
        ({"pieces": (piece(size=(2.0,)),)}, r"Manifest\.pieces\[0\]\.size"),
        ({"pieces": (piece(start=(-1,)),)}, r"Manifest\.pieces\[0\]\.start=\(-1,\)"),
        ({"pieces": (piece(start=(0, 0)),)}, r"one for each dimension of size=\(2,\)"),
        (
            {"pieces": (piece(offset=28),)},
            r"Manifest\.pieces\[0\]\.offset=28 must lie in the chunk of 28 bytes",
        ),
        ({"pieces": (piece(offset=-4),)}, r"Manifest\.pieces\[0\]\.offset=-4"),
        (
            {"checksums": (Checksum(offset=0, num_bytes=28, xxh3="0X"),)},
            r"checksums\[0\]\.xxh3='0X' must be 16",
        ),
        ({"checksums": (Checksum(offset=0, num_bytes=-1, xxh3="0" * 16),)}, r"checksums\[0\].*num_bytes=-1"),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_field(changed, words):
    with pytest.raises(ValueError, match=words):
        make(**changed)
    if pieces := changed.get("pieces"):
        rows = [
            [p.source if p.sink is None else p.sink, list(p.start), list(p.size), p.offset] for p in pieces
        ]
        changed = {"pieces": rows}
    elif checksums := changed.get("checksums"):
        changed = {"checksums": [[c.offset, c.num_bytes, c.xxh3] for c in checksums]}
    with pytest.raises(ValueError, match=words):
        Manifest.from_json(as_json(**changed))


@pytest.mark.parametrize(("sink", "source"), [(1, "x"), (None, None)])
def test_a_piece_is_of_a_sink_or_of_a_whole_tensor(sink, source):
    with pytest.raises(ValueError, match=r"Manifest\.pieces\[0\]\.(sink=1 .* without a source|source=None)"):
        make(pieces=(piece(sink=sink, source=source),))


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
        (as_json(digest="0" * 64), r"Manifest\.digest='0000.* is not that of its pieces"),
        (as_json(pieces={}), r"Manifest\.pieces must be a list"),
        (as_json(pieces=[{}]), r"Manifest\.pieces\[0\] must be a list of 4"),
        (as_json(pieces=[[1, [0], [2]]]), r"Manifest\.pieces\[0\] must be a list of 4"),
        (as_json(pieces=[[1, 0, [2], 0]]), r"Manifest\.pieces\[0\]\.start=0"),
        (as_json(pieces=[[None, [0], [2], 0]]), r"Manifest\.pieces\[0\]\.source=None"),
        (as_json(checksums=7), r"Manifest\.checksums must be a list, got 7"),
        (as_json(checksums=[[0, 28]]), r"Manifest\.checksums\[0\] must be a list of 3"),
    ],
)
def test_json_of_another_form_is_refused(value, words):
    with pytest.raises(ValueError, match=words):
        Manifest.from_json(value)
