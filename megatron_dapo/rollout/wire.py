"""How sampled tokens travel from an engine to the controller: as a stream of frames, one for each response.

A frame is

    magic "DAP1" | header bytes u32 | payload bytes u32 | crc32 of header and payload u32 | header | payload

little-endian. The header is JSON and small; the payload holds the token ids (int32) and then the
log-probabilities (float32) of R tokens as they lie in memory, 8 bytes a token. The digit of the magic is the
version of this format. A stream ends with an end frame or an error frame, so a cut one is noticed.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAGIC = b"DAP1"
PREFIX = struct.Struct("<4sIII")
MAX_HEADER = 1 << 24  # bytes; weight-version runs and error texts are far below
MAX_PAYLOAD = 1 << 30
CONTENT_TYPE = "application/x-megatron-dapo-tokens"
GENERATE_PATH = "/megatron_dapo/v1/generate"
PARTIALS_PATH = "/megatron_dapo/v1/partials"
PROGRESS_PATH = "/megatron_dapo/v1/progress"
SEED_STRIDE = 1_000_003
# (label of the weight version, number of tokens it sampled), in the order of the tokens
LabelRuns = tuple[tuple[str, int], ...]


class WireError(ValueError):
    """Bytes that are no stream of frames, or not the whole of one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokensFrame:
    """R tokens of one response: number `index` of its request's.

    tokens int32 [R], logprobs float32 [R]. finish_reason: the engine's word; None while the response runs.
    runs: empty if the engine named no weight version. request_id: in answers about several requests.
    """

    index: int
    finish_reason: str | None
    tokens: np.ndarray
    logprobs: np.ndarray
    runs: LabelRuns = ()
    request_id: str | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.logprobs):
            raise WireError(f"{len(self.tokens)} tokens and {len(self.logprobs)} log-probabilities")
        if self.runs and sum(count for _, count in self.runs) != len(self.tokens):
            raise WireError(f"weight versions {self.runs} do not cover {len(self.tokens)} tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class EndFrame:
    """All has been sent: `count` frames of tokens."""

    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorFrame:
    """The request failed after its answer had begun. status: what the HTTP status would have been."""

    status: int
    reason: str
    text: str


Frame = TokensFrame | EndFrame | ErrorFrame


def sequence_seed(seed: int, number: int, num_began: int) -> int:
    """The seed of a prompt's sequence `number`: vLLM's rule, seed + number. One that goes on from `num_began`
    tokens has another, so that it does not draw the random numbers of its first tokens again.
    """
    return seed + number + SEED_STRIDE * num_began


def encode(frame: Frame) -> bytes:
    """The bytes of one frame."""
    payload = b""
    if isinstance(frame, TokensFrame):
        header: dict[str, Any] = {
            "kind": "tokens",
            "index": frame.index,
            "finish_reason": frame.finish_reason,
            "tokens": len(frame.tokens),
            "runs": frame.runs,
        }
        if frame.request_id is not None:
            header["request_id"] = frame.request_id
        tokens = np.ascontiguousarray(frame.tokens, dtype="<i4")
        payload = tokens.tobytes() + np.ascontiguousarray(frame.logprobs, dtype="<f4").tobytes()
    elif isinstance(frame, EndFrame):
        header = {"kind": "end", "count": frame.count}
    else:
        header = {"kind": "error", "status": frame.status, "reason": frame.reason, "text": frame.text}
    head = json.dumps(header).encode()
    return b"".join((_prefix(head, payload), head, payload))


def _prefix(head: bytes, payload: bytes) -> bytes:
    return PREFIX.pack(MAGIC, len(head), len(payload), zlib.crc32(payload, zlib.crc32(head)))


class FrameDecoder:
    """Takes the bytes of a stream in pieces of any size. WireError when they are not what `encode` makes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._tokens_frames = 0
        self._ended = False

    def feed(self, piece: bytes) -> list[Frame]:
        """The frames that this piece completes."""
        self._buffer += piece
        frames: list[Frame] = []
        start = 0
        while (end := self._frame_end(start)) is not None:
            frames.append(self._frame(start, end))
            start = end
        del self._buffer[:start]
        return frames

    def finish(self) -> None:
        """The stream is over. WireError unless it ended with an end or error frame."""
        if self._buffer or not self._ended:
            raise WireError(
                f"the answer ends early: after {self._tokens_frames} responses and {len(self._buffer)} bytes "
                "of the next frame"
            )

    def _frame_end(self, start: int) -> int | None:
        """Where the frame at `start` ends; None if it is not all there yet."""
        magic = bytes(self._buffer[start : start + len(MAGIC)])
        if magic != MAGIC[: len(magic)]:
            raise WireError(
                f"a frame begins with {magic!r} and not with {MAGIC!r}: the server speaks another version of "
                "this format, or its bytes were damaged"
            )
        if magic and self._ended:
            raise WireError("bytes after the end of the answer")
        if len(self._buffer) - start < PREFIX.size:
            return None
        _, head, payload, _ = PREFIX.unpack_from(self._buffer, start)
        if head > MAX_HEADER or payload > MAX_PAYLOAD:
            raise WireError(f"a frame of {head} + {payload} bytes: its bytes were damaged")
        end = start + PREFIX.size + head + payload
        return end if end <= len(self._buffer) else None

    def _frame(self, start: int, end: int) -> Frame:
        _, head_size, _, checksum = PREFIX.unpack_from(self._buffer, start)
        body = bytes(memoryview(self._buffer)[start + PREFIX.size : end])
        if zlib.crc32(body) != checksum:
            raise WireError("a frame's checksum is wrong: its bytes were damaged")
        try:
            frame = _frame_of(json.loads(body[:head_size]), memoryview(body)[head_size:])
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"a frame cannot be read ({type(error).__name__}: {error})") from error
        if isinstance(frame, TokensFrame):
            self._tokens_frames += 1
        else:
            self._ended = True
        if isinstance(frame, EndFrame) and frame.count != self._tokens_frames:
            raise WireError(f"{self._tokens_frames} responses arrived of {frame.count}")
        return frame


def _frame_of(header: dict[str, Any], payload: memoryview) -> Frame:
    kind = header["kind"]
    if kind == "end":
        return EndFrame(count=header["count"])
    if kind == "error":
        return ErrorFrame(status=header["status"], reason=header["reason"], text=header["text"])
    if kind != "tokens":
        raise WireError(f"unknown kind of frame {kind!r}")
    size = header["tokens"]
    if len(payload) != 8 * size:
        raise WireError(f"{len(payload)} bytes for {size} tokens of 8 bytes")
    return TokensFrame(
        index=header["index"],
        finish_reason=header["finish_reason"],
        tokens=np.frombuffer(payload, "<i4", size).astype(np.int32),
        logprobs=np.frombuffer(payload, "<f4", size, 4 * size).astype(np.float32),
        runs=_runs(header["runs"]),
        request_id=header.get("request_id"),
    )


def _runs(runs: Sequence[Sequence[Any]]) -> LabelRuns:
    return tuple((str(label), int(count)) for label, count in runs)
