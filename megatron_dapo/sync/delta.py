"""Between hosts only the elements whose bits have changed since the last push, without loss.

At a small learning rate few weights move as far as another bf16 number. A parcel (sync/plan.py) of 16-bit
elements is sent as a *delta*: which elements have changed since it was last sent, and what they are now.

Both ends keep the parcel as it was sent last, its *image*, in host memory: the sender in a DeltaSender, the
carrier where it hands the parcel over to its worker. (Its memory has a place for every round of a push, and
not for two rounds that take turns; a delta is written into what the last push left there.) So engines know
nothing of deltas. They get whole chunks as ever, also where they repack their weights and keep nothing of
what was loaded, and an engine that fails or restarts takes no image with it.

Which image somebody has is told by its *fingerprint*, a hash of the bits. When a push begins the carriers say
what they hold. A sender answers with a delta where that is its own image, and else with the whole parcel: to
a carrier whose worker is new or missed a push, and after an error. Whatever was sent, the result must have
the fingerprint of the sender's parcel, so that no fault leaves a wrong weight behind:

    outgoing = sender.take(number, packed)          # a DeltaSender; once in a push
    body = outgoing.to(receiver.held(number))       # a DeltaReceiver, on the other host
    receiver.take(number, body, outgoing.fingerprint, image)

Memory: a sender keeps each parcel that it sends to other hosts once, however many workers get it; where all
engines cut the model alike, that is about its own parameters in 16 bits (2.1 GB a rank for Qwen2.5-32B at
tp 8, pp 4). A carrier keeps the shards of its workers (16.4 GB each at tp 4) instead of two chunks of each.
While a parcel is encoded its delta exists twice.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

NOTHING = 0  # fingerprint of no image
WORTH = 0.8  # of the parcel's bytes, at most, for a delta to be sent

_BLOCK = 1 << 19  # elements that are encoded at once: a few MB of temporaries, which caches hold
_HEADER_BYTES = 24  # three int64: changed elements; bytes of gaps, or _BITMAP; wide steps, or _VALUES
_BITMAP = _VALUES = -1
_LONG_GAP = 255  # goes on in the next byte
_WIDE_STEP = -128  # stands for a step that does not fit into a byte


class DeltaError(ValueError):
    """What was received is not what was sent."""


def fingerprint(packed: torch.Tensor) -> int:
    """XXH3 of the bytes as a signed number of 64 bits, which an int64 tensor can hold."""
    return int.from_bytes(xxhash.xxh3_64_digest(packed.numpy().data), "big", signed=True)


def encode(old: torch.Tensor, new: torch.Tensor, *, worth: float = WORTH) -> torch.Tensor | None:
    """What turns `old` into `new`; None where it has `worth` (at most 1) times the bytes of `new` or more.

    old, new: contiguous bytes of 16-bit elements, on the CPU. A delta is made of blocks of 2^19 elements. A
    block of n elements, c of them changed, takes at most 24 + 2 c + min(n / 8, c + n / 255) bytes, rounded
    up: positions are a bitmap or gaps of a byte each, and an element is two bytes, or one where its bits,
    read as an integer, moved by less than 128 (to the next bf16 number they move by 1).
    """
    before, after = _elements(old, "old"), _elements(new, "new")
    if len(before) != len(after):
        raise ValueError(f"old has {len(before)} elements and new {len(after)}; a delta needs as many")
    parts: list[np.ndarray] = []
    left = worth * new.nbytes
    for begin in range(0, len(after), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        parts += _encode_block(before[block], after[block])
        left -= sum(part.nbytes for part in parts[-4:])
        if left <= 0:
            return None
    return torch.from_numpy(np.concatenate([part.view(np.uint8) for part in parts])) if parts else None


def decode(encoded: torch.Tensor, target: torch.Tensor, expected: int) -> None:
    """Turn `target`, the `old` of `encode`, into its `new`, in place.

    encoded, target: contiguous bytes on the CPU. DeltaError when `encoded` makes no sense or the result does
    not have the fingerprint `expected`; then `target` may hold anything.
    """
    elements, body = _elements(target, "target"), encoded.numpy()
    for begin in range(0, len(elements), _BLOCK):
        body = _decode_block(body, elements[begin : begin + _BLOCK])
    if len(body):
        raise DeltaError(f"a delta has {len(body)} bytes more than its blocks")
    _check(target, expected)


def _encode_block(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, ...]:
    """Header, wide steps or values, positions, narrow steps."""
    changed = before != after
    at = np.flatnonzero(changed)
    positions, num_gaps = np.packbits(changed), _BITMAP
    if len(at) <= len(positions) and len(gaps := _gaps(at)) <= len(positions):
        positions, num_gaps = gaps, len(gaps)
    values = after[at]
    steps = values - before[at]  # numpy's int16 wraps around, and so does the sum in `_decode_block`
    is_wide = (steps < -127) | (steps > 127)
    num_wide = int(np.count_nonzero(is_wide))
    if 2 * num_wide <= len(at):
        wide, narrow = steps[is_wide], np.where(is_wide, _WIDE_STEP, steps).astype(np.int8)
    else:
        num_wide, wide, narrow = _VALUES, values, np.empty(0, np.int8)
    header = np.array([len(at), num_gaps, num_wide], dtype=np.int64)
    return header, wide, positions, narrow


def _decode_block(body: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """Apply the first block of `body`; what follows it is returned."""
    if len(body) < _HEADER_BYTES:
        raise DeltaError(f"a delta ends {_HEADER_BYTES - len(body)} bytes before the end of a header")
    header, body = body[:_HEADER_BYTES].copy(), body[_HEADER_BYTES:]
    count, num_gaps, num_wide = map(int, header.view(np.int64))
    is_bitmap, is_narrow = num_gaps == _BITMAP, num_wide != _VALUES
    sizes = (
        2 * (num_wide if is_narrow else count),
        -(-len(elements) // 8) if is_bitmap else num_gaps,
        count if is_narrow else 0,
    )
    if min(*sizes, count) < 0 or sum(sizes) > len(body):
        raise DeltaError(
            f"a block of a delta has {len(body)} bytes and the header {count, num_gaps, num_wide}"
        )
    wide, positions, narrow, body = np.split(body, np.cumsum(sizes))
    wide = wide.copy().view(np.int16)
    at = _set_bits(positions, len(elements)) if is_bitmap else _ends(positions)
    if len(at) != count or (count and at[-1] >= len(elements)):
        raise DeltaError(f"a block of a delta has {len(at)} positions, not {count}, or some behind its end")
    if not is_narrow:
        elements[at] = wide
        return body
    steps = narrow.view(np.int8).astype(np.int16)
    is_wide = steps == _WIDE_STEP
    if np.count_nonzero(is_wide) != num_wide:
        raise DeltaError(f"a block of a delta has {np.count_nonzero(is_wide)} wide steps, not {num_wide}")
    steps[is_wide] = wide
    elements[at] += steps
    return body


def _elements(packed: torch.Tensor, name: str) -> np.ndarray:
    """The bits of 16-bit elements, as a view."""
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous() or packed.nbytes % 2:
        raise ValueError(
            f"{name} must be an even number of contiguous bytes, got {packed.dtype} of shape "
            f"{tuple(packed.shape)} and stride {packed.stride()}"
        )
    return packed.numpy().view(np.int16)


def _gaps(at: np.ndarray) -> np.ndarray:
    """Before each position the number of positions between it and the one before, in bytes: 255 and what is
    left for larger ones.
    """
    gaps = np.diff(at.astype(np.int32), prepend=np.int32(-1)) - np.int32(1)
    num_long = gaps // _LONG_GAP
    coded = (gaps - num_long * _LONG_GAP).astype(np.uint8)
    long = np.flatnonzero(num_long)
    return np.insert(coded, np.repeat(long, num_long[long]), _LONG_GAP) if len(long) else coded


def _ends(gaps: np.ndarray) -> np.ndarray:
    """The positions behind the gaps."""
    last = np.flatnonzero(gaps != _LONG_GAP)
    return gaps.cumsum(dtype=np.int64)[last] + np.arange(len(last))


def _set_bits(bitmap: np.ndarray, length: int) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(bitmap, count=length).view(bool))


def _check(packed: torch.Tensor, expected: int) -> None:
    if (found := fingerprint(packed)) != expected:
        raise DeltaError(
            f"a parcel of {packed.nbytes} bytes has the fingerprint {found}, sent was {expected}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """A parcel of one push. whole: its bytes, until the sender takes the parcel again. delta: what turns the
    image with the fingerprint `base` into it, if that is worth sending.
    """

    whole: torch.Tensor
    fingerprint: int
    base: int
    delta: torch.Tensor | None

    def to(self, held: int) -> torch.Tensor:
        """What to send to a carrier whose image has the fingerprint `held`; a delta has fewer bytes."""
        return self.delta if self.delta is not None and held == self.base else self.whole


class DeltaSender:
    """The images of what one rank sends to other hosts. Numbers of parcels are the caller's."""

    def __init__(self, worth: float = WORTH) -> None:
        self._worth = worth
        self._images: dict[Hashable, tuple[torch.Tensor, int]] = {}  # bytes and fingerprint, by parcel

    @property
    def num_bytes(self) -> int:
        return sum(image.nbytes for image, _ in self._images.values())

    def take(self, number: Hashable, packed: torch.Tensor) -> Outgoing:
        """Keep the parcel as it is in this push. To be called once in a push; `packed` is free afterwards."""
        found, delta = fingerprint(packed), None
        image, base = self._images.get(number, (None, NOTHING))
        if image is None:
            image = packed.clone()
        else:
            delta = encode(image, packed, worth=self._worth)
            image.copy_(packed)
        self._images[number] = image, found
        return Outgoing(whole=image, fingerprint=found, base=base, delta=delta)


class DeltaReceiver:
    """Which images one carrier has; the memory is the caller's. Numbers of messages are the caller's."""

    def __init__(self) -> None:
        self._held: dict[Hashable, int] = {}

    def held(self, number: Hashable) -> int:
        return self._held.get(number, NOTHING)

    def forget(self, number: Hashable) -> None:
        """To be called before anything is written over the image."""
        self._held.pop(number, None)

    def take(self, number: Hashable, body: torch.Tensor, expected: int, image: torch.Tensor) -> None:
        """Turn the image into what was sent: a delta for it, or all its bytes (which may lie there already).

        DeltaError when the image does not have the fingerprint `expected` then; it counts as none.
        """
        self.forget(number)
        if body.nbytes < image.nbytes:
            decode(body, image, expected)
        else:
            if body.data_ptr() != image.data_ptr():
                image.copy_(body)
            _check(image, expected)
        self._held[number] = expected
