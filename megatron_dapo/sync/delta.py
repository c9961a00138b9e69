"""Between hosts only the elements whose bits have changed since the last push, without loss.

At a small learning rate few weights move as far as another bf16 number. A parcel (sync/plan.py) of 16-bit
elements is sent as a *delta*: which elements have changed since it was last sent, and what they are now.

Both ends keep the parcel as it was sent last, its *image*, in host memory: the sender in a DeltaSender, the
carrier where it hands the parcel over to its worker, which reads whole chunks as ever and knows nothing of
deltas. Images are told apart by their *fingerprint*, a hash of the bits. The sender remembers which one
every worker's carrier was sent. A delta goes to those that have the image with which it begins, the whole
parcel to all others: a new worker, one that was left out of a push, one whose carrier was lost. Whatever was
sent, the result must have the fingerprint of the sender's parcel, so no fault leaves a wrong weight behind:

    outgoing = sender.take(number, packed)            # once in a push
    body = sender.body(worker, number, outgoing)
    restore(body, image, outgoing.fingerprint)        # on the other host

Memory: a sender keeps each parcel that it sends to other hosts once, however many workers get it; where all
engines cut the model alike, that is about its own parameters in 16 bits (2.1 GB a rank for Qwen2.5-32B at
tp 8, pp 4). A carrier keeps the shards of its workers (16.4 GB each at tp 4) instead of two chunks of each.
While a parcel is encoded its delta exists twice.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
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


def restore(body: torch.Tensor, image: torch.Tensor, expected: int) -> None:
    """Turn the image into what was sent: by a delta, or all of its bytes, which lie there already.

    DeltaError when it does not have the fingerprint `expected` then; it may hold anything.
    """
    if body.nbytes < image.nbytes:
        decode(body, image, expected)
    else:
        _check(image, expected)


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """A parcel of one push. whole: its bytes, until the sender takes the parcel again. delta: what turns the
    image with the fingerprint `base` into it, if that is worth sending.
    """

    whole: torch.Tensor
    fingerprint: int
    base: int
    delta: torch.Tensor | None


class Trial:
    """Whether deltas pay on these links: the second push to the same engines sends everything (the first one
    makes all memory), the third one deltas, and what took less time is kept. Ranks that are given the same
    numbers decide alike.
    """

    def __init__(self) -> None:
        self._engines: frozenset[str] = frozenset()
        self._seconds: list[float] = []  # of the pushes to these engines, without a loss

    @property
    def sends_whole(self) -> bool:
        """In the next push."""
        return len(self._seconds) == 1

    def loses(self, engines: frozenset[str], seconds: float) -> bool:
        """After each push, with the engines that it reached: whether deltas are to be given up."""
        if len(self._seconds) >= 3:
            return False
        if engines != self._engines:
            self._engines, self._seconds = engines, []
        self._seconds.append(seconds)
        return len(self._seconds) == 3 and self._seconds[2] >= self._seconds[1]

    def __str__(self) -> str:
        return f"{self._seconds[2]:.2f} s with deltas, {self._seconds[1]:.2f} s without"


class DeltaSender:
    """The images of what one rank sends to other hosts, and who has been sent which. Numbers of parcels and
    of workers are the caller's.
    """

    def __init__(self, worth: float = WORTH) -> None:
        self._worth = worth
        self._images: dict[Hashable, tuple[torch.Tensor, int]] = {}  # bytes and fingerprint, by parcel
        self._held: dict[int, dict[Hashable, int]] = {}  # fingerprints, by worker and parcel

    @property
    def num_bytes(self) -> int:
        return sum(image.nbytes for image, _ in self._images.values())

    def take(self, number: Hashable, packed: torch.Tensor, *, whole: bool = False) -> Outgoing:
        """Keep the parcel as it is in this push, and find its delta unless it is to be sent `whole`. To be
        called once in a push; `packed` is free afterwards.
        """
        found, delta = fingerprint(packed), None
        image, base = self._images.get(number, (None, NOTHING))
        if image is None:
            image = packed.clone()
        else:
            delta = None if whole else encode(image, packed, worth=self._worth)
            image.copy_(packed)
        self._images[number] = image, found
        return Outgoing(whole=image, fingerprint=found, base=base, delta=delta)

    def body(self, worker: int, number: Hashable, outgoing: Outgoing) -> torch.Tensor:
        """What to send to this worker's carrier, which counts as sent; a delta has fewer bytes."""
        of_worker = self._held.setdefault(worker, {})
        held, of_worker[number] = of_worker.get(number, NOTHING), outgoing.fingerprint
        return outgoing.delta if outgoing.delta is not None and held == outgoing.base else outgoing.whole

    def forget(self, workers: Collection[int]) -> None:
        """What they were sent may not have arrived."""
        for worker in workers:
            self._held.pop(worker, None)
