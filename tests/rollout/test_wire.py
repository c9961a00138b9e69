"""Frames of tokens: what comes out is what went in, however the bytes are cut, and damage is named."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.rollout.wire import (
    EndFrame,
    ErrorFrame,
    Frame,
    FrameDecoder,
    TokensFrame,
    WireError,
    encode,
)


def tokens_frame(tokens=(7, 8), logprobs=(-0.5, -1.5), **changes) -> TokensFrame:
    values = {"index": 0, "finish_reason": "stop", "runs": (("3", len(tokens)),)} | changes
    return TokensFrame(tokens=np.array(tokens, np.int32), logprobs=np.array(logprobs, np.float32), **values)


def same(one: Frame, other: Frame) -> bool:
    if not isinstance(one, TokensFrame) or not isinstance(other, TokensFrame):
        return one == other
    fields = ("index", "finish_reason", "runs", "request_id")
    return (
        all(getattr(one, name) == getattr(other, name) for name in fields)
        and one.tokens.dtype == other.tokens.dtype == np.int32
        and one.logprobs.dtype == other.logprobs.dtype == np.float32
        and one.tokens.tobytes() == other.tokens.tobytes()
        and one.logprobs.tobytes() == other.logprobs.tobytes()
    )


def decoded(pieces: list[bytes]) -> list[Frame]:
    decoder = FrameDecoder()
    frames = [frame for piece in pieces for frame in decoder.feed(piece)]
    decoder.finish()
    return frames


def test_the_bytes_are_those_of_the_format():
    """Written down by hand: a reader in another language needs no more than this."""
    frame = tokens_frame((1, -2), (-0.5, -0.25), index=3, runs=(("7", 1), ("8", 1)))
    head = json.dumps(
        {"kind": "tokens", "index": 3, "finish_reason": "stop", "tokens": 2, "runs": [["7", 1], ["8", 1]]}
    ).encode()
    payload = bytes.fromhex("01000000 feffffff 000000bf 000080be")
    sizes = struct.pack("<III", len(head), 16, zlib.crc32(head + payload))
    assert encode(frame) == b"DAP1" + sizes + head + payload


@st.composite
def streams(draw) -> list[Frame]:
    frames: list[Frame] = []
    for index in range(draw(st.integers(0, 4))):
        tokens = draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=30))
        logprobs = draw(
            st.lists(st.floats(width=32), min_size=len(tokens), max_size=len(tokens))
        )  # NaN and infinities too
        cut = draw(st.integers(0, len(tokens)))
        frames.append(
            tokens_frame(
                tokens,
                logprobs,
                index=index,
                finish_reason=draw(st.sampled_from(["stop", "length", "abort", None])),
                runs=draw(st.sampled_from([(), (("a", cut), ("b", len(tokens) - cut))])),
                request_id=draw(st.none() | st.text(max_size=5)),
            )
        )
    end = EndFrame(count=len(frames))
    error = ErrorFrame(status=503, reason="engine_died", text=draw(st.text(max_size=20)))
    return [*frames, draw(st.sampled_from([end, error]))]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in zip(edges, edges[1:], strict=False)]


@given(streams(), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_cutting_gives_the_same_frames(frames, places):
    data = b"".join(encode(frame) for frame in frames)
    for pieces in (cut(data, places), [data], [data[i : i + 1] for i in range(len(data))]):
        got = decoded(pieces)
        assert len(got) == len(frames)
        assert all(same(one, other) for one, other in zip(got, frames, strict=True))


@given(streams(), st.integers(0, 10_000))
def test_a_stream_that_ends_early_is_noticed(frames, place):
    data = b"".join(encode(frame) for frame in frames)
    with pytest.raises(WireError, match="ends early"):
        decoded([data[: place % len(data)]])


@given(streams(), st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_noticed(frames, place, change):
    data = bytearray(b"".join(encode(frame) for frame in frames))
    data[place % len(data)] ^= change
    with pytest.raises(WireError):
        decoded([bytes(data)])


def rebuilt(header: dict, payload: bytes = b"") -> bytes:
    """A frame whose checksum is right."""
    head = json.dumps(header).encode()
    return (
        struct.pack("<4sIII", b"DAP1", len(head), len(payload), zlib.crc32(head + payload)) + head + payload
    )


TOKENS = {"kind": "tokens", "index": 0, "finish_reason": None, "tokens": 2, "runs": []}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"HTTP/1.1 200 OK", r"begins with b'HTTP' and not with b'DAP1'.*another version"),
        (b"DAP2" + bytes(12), r"b'DAP2'.*another version"),
        (struct.pack("<4sIII", b"DAP1", 5, 1 << 31, 0), r"5 \+ 2147483648 bytes"),
        (rebuilt({"kind": "sound"}), "unknown kind of frame 'sound'"),
        (rebuilt(TOKENS, bytes(12)), "12 bytes for 2 tokens"),
        (rebuilt(TOKENS | {"runs": [["1", 1]]}, bytes(16)), "do not cover 2 tokens"),
        (rebuilt({"kind": "tokens"}), "cannot be read.*KeyError"),
        (encode(tokens_frame()) + encode(EndFrame(count=2)), "1 responses arrived of 2"),
        (encode(EndFrame(count=0)) * 2, "after the end"),
    ],
)
def test_what_is_no_stream_is_refused_with_words(data, words):
    with pytest.raises(WireError, match=words):
        decoded([data])


def test_a_frame_that_contradicts_itself_is_not_sent():
    with pytest.raises(WireError, match="2 tokens and 1 log-probabilities"):
        tokens_frame((1, 2), (-1.0,))
