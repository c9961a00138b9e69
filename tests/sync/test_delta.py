"""Deltas between pushes: any bits come back, what is broken is an error, what does not pay is not made."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.sync import delta
from megatron_dapo.sync.delta import DeltaError, DeltaSender, Trial, decode, encode, fingerprint, restore

# Of bf16: NaNs with different bits, 0.0 and -0.0, infinity.
SPECIAL = [0x7FC0, 0x7F81, -0x0001, 0x0000, -0x8000, 0x7F80]
BLOCK = 64  # elements, so that small parcels have several blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(delta, "_BLOCK", BLOCK)


def packed(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int16).view(torch.uint8)


def pack_bf16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).view(torch.uint8)


def applied(encoded: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    target = old.clone()
    decode(encoded, target, fingerprint(new))
    return target


@st.composite
def parcels(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Old and new bits: up to 5 blocks, of which a drawn share moves by a little or to anything."""
    length = draw(st.integers(1, 5 * BLOCK))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    old = torch.randint(-(1 << 15), 1 << 15, (length,), generator=generator).to(torch.int16)
    share = draw(st.sampled_from([0, 0.004, 0.05, 0.5, 1]))
    reach = draw(st.sampled_from([1, 127, 128, 1 << 15]))
    steps = torch.randint(-reach, reach + 1, (length,), generator=generator)
    moves = torch.rand(length, generator=generator) < share
    new = torch.where(moves, old + steps, old).to(torch.int16)
    pairs = st.tuples(st.integers(0, length - 1), st.sampled_from(SPECIAL), st.sampled_from(SPECIAL))
    for place, before, after in draw(st.lists(pairs, max_size=4)):
        old[place], new[place] = before, after
    return old.view(torch.uint8), new.view(torch.uint8)


@given(parcels())
@settings(max_examples=400, deadline=None)
def test_every_bit_comes_back_within_the_bound(parcel):
    old, new = parcel
    changed = old.view(torch.int16) != new.view(torch.int16)
    bound = 0
    for block in changed.split(BLOCK):
        count, length = int(block.sum()), len(block)
        bound += 24 + 2 * count + min(-(-length // 8), count + length // 255)
    encoded = encode(old, new, worth=1)
    if encoded is None:
        assert bound >= new.nbytes
    else:
        assert encoded.nbytes <= bound and encoded.nbytes < new.nbytes
        assert torch.equal(applied(encoded, old, new), new)


@given(parcels(), st.data())
@settings(max_examples=400, deadline=None)
def test_a_broken_delta_is_an_error(parcel, data):
    old, new = parcel
    if (encoded := encode(old, new, worth=1)) is None:
        return
    broken, place = encoded.clone(), data.draw(st.integers(0, len(encoded) - 1))
    broken[place] ^= data.draw(st.integers(1, 255))
    for wrong in (encoded[:place], torch.cat([encoded, encoded[:1]])):
        with pytest.raises(DeltaError):
            applied(wrong, old, new)
    with contextlib.suppress(DeltaError):
        assert torch.equal(applied(broken, old, new), new)  # unused bits at the end of a bitmap


@given(parcels(), st.data())
@settings(max_examples=200, deadline=None)
def test_another_base_is_an_error(parcel, data):
    old, new = parcel
    if (encoded := encode(old, new, worth=1)) is None:
        return
    place = data.draw(st.integers(0, len(old) - 1))
    base = old.clone()
    base[place] ^= 1
    target = base.clone()
    try:
        decode(encoded, target, fingerprint(new))
    except DeltaError:
        return
    assert torch.equal(target, new)  # the element was sent as a value


def test_bytes_by_hand():
    old = packed([0] * 64)
    none_changed = encode(old, old)
    assert none_changed is not None and none_changed.tolist() == [0] * 24
    # element 3 by +1, element 5 by -2, element 20 by 1000: gaps 3, 1, 14; the wide step in two bytes
    new = [0] * 64
    new[3], new[5], new[20] = 1, -2, 1000
    encoded = encode(old, packed(new))
    assert encoded is not None
    header, body = encoded[:24].view(torch.int64).tolist(), encoded[24:].tolist()
    assert header == [3, 3, 1]
    assert body == [1000 % 256, 1000 // 256, 3, 1, 14, 1, 254, 128]
    # steps of 127 fit into a byte, those of -128 do not
    encoded = encode(old, packed([127, -127, -128] + [0] * 61))
    assert encoded is not None
    assert encoded[:24].view(torch.int64).tolist() == [3, 3, 1]
    assert encoded[24:].tolist() == [128, 255, 0, 0, 0, 127, 129, 128]
    # nine elements next to each other: a bitmap of 8 bytes is shorter than nine gaps
    encoded = encode(old, packed([1] * 9 + [0] * 55))
    assert encoded is not None
    assert encoded[:24].view(torch.int64).tolist() == [9, -1, 0]
    assert encoded[24:].tolist() == [0xFF, 0x80, 0, 0, 0, 0, 0, 0] + [1] * 9


def test_long_gaps(monkeypatch):
    monkeypatch.setattr(delta, "_BLOCK", 1 << 19)
    old = packed([0] * 4000)
    for places in ([254], [255], [256], [0, 255, 511], [509, 510], [0, 1, 3999]):
        new = packed([7 * (place in places) for place in range(4000)])
        encoded = encode(old, new)
        assert encoded is not None and encoded.nbytes <= 24 + 2 * len(places) + 4000 // 255
        assert torch.equal(applied(encoded, old, new), new)


def test_nothing_in_a_parcel():
    assert encode(packed([]), packed([])) is None


def test_what_does_not_pay():
    old = packed(list(range(1000)))
    new = packed([(7919 * i) % 30011 for i in range(1000)])
    assert encode(old, new, worth=1) is None  # all changed, by much
    close = packed([i + 1 for i in range(1000)])  # all changed, by 1: 1,000 bytes and 16 blocks of 24 + 8
    encoded = encode(old, close, worth=1)
    assert encoded is not None and encoded.nbytes == 1000 + 15 * 32 + 24 + 5
    assert encode(old, close, worth=0.7) is None


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(8, dtype=torch.int16),
        torch.zeros(7, dtype=torch.uint8),
        torch.zeros(4, 2, dtype=torch.uint8),
        torch.zeros(16, dtype=torch.uint8)[::2],
    ],
    ids=["dtype", "odd", "shape", "stride"],
)
def test_only_contiguous_bytes(wrong):
    right = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="target must be an even number of contiguous bytes"):
        decode(right, wrong, 0)
    with pytest.raises(ValueError, match="new must be"):
        encode(right, wrong)
    with pytest.raises(ValueError, match="old has 4 elements and new 3"):
        encode(right, right[:6])


def push(sender: DeltaSender, images: dict[int, torch.Tensor], weights: torch.Tensor) -> dict[int, int]:
    """Bytes sent to each of the workers that have these images."""
    outgoing = sender.take(0, weights)
    sent = {}
    for worker, image in images.items():
        receive(image, body := sender.body(worker, 0, outgoing).clone(), outgoing.fingerprint)
        assert torch.equal(image, weights)
        sent[worker] = body.nbytes
    return sent


def receive(image: torch.Tensor, body: torch.Tensor, expected: int) -> None:
    """As a carrier does: whole bytes are written where they belong, a delta beside it."""
    if body.nbytes == image.nbytes:
        image.copy_(body)
    restore(body, image, expected)


def test_two_ends_over_updates():
    weights = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    sender = DeltaSender()
    images = {worker: torch.zeros(20_000, dtype=torch.uint8) for worker in (1, 2)}
    whole = {1: 20_000, 2: 20_000}
    assert push(sender, images, pack_bf16(weights)) == whole
    headers = 24 * math.ceil(10_000 / BLOCK)
    assert push(sender, images, pack_bf16(weights)) == {1: headers, 2: headers}, "nothing has changed"
    weights = weights * 1.0002
    sent = push(sender, images, pack_bf16(weights))
    assert sent[1] == sent[2] < 0.5 * 20_000
    # worker 2 misses a push, gets the next one whole and then deltas again
    weights = weights * 1.0002
    assert push(sender, {1: images[1]}, pack_bf16(weights))[1] < 10_000
    weights = weights * 1.0002
    sent = push(sender, images, pack_bf16(weights))
    assert sent[1] < 10_000 and sent[2] == 20_000
    assert push(sender, images, pack_bf16(weights * 1.0002))[2] < 10_000
    assert sender.num_bytes == 20_000
    sender.forget([2])
    sent = push(sender, images, pack_bf16(weights))
    assert sent[1] < 10_000 and sent[2] == 20_000


def test_a_result_that_was_not_sent_is_an_error():
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    sender, image = DeltaSender(), torch.zeros(2000, dtype=torch.uint8)
    push(sender, {1: image}, pack_bf16(weights))
    image[17] ^= 1  # the memory is not what was sent
    outgoing = sender.take(0, pack_bf16(weights * 1.0002))
    body = sender.body(1, 0, outgoing)
    assert body.nbytes < 2000
    with pytest.raises(DeltaError, match="fingerprint"):
        receive(image, body, outgoing.fingerprint)
    with pytest.raises(DeltaError, match="fingerprint"):
        receive(image, outgoing.whole.flip(0), outgoing.fingerprint)
    receive(image, outgoing.whole, outgoing.fingerprint)
    assert torch.equal(image, pack_bf16(weights * 1.0002))


def test_the_senders_memory_may_be_used_again():
    sender, memory = DeltaSender(), pack_bf16(torch.ones(100))
    outgoing = sender.take(0, memory)
    memory.zero_()
    assert torch.equal(outgoing.whole, pack_bf16(torch.ones(100)))


def test_deltas_that_take_longer_are_given_up():
    one, two, trial = frozenset("a"), frozenset("ab"), Trial()
    sends_whole, loses = [], []
    for engines, seconds in ((one, 9.0), (one, 1.0), (two, 9.0), (two, 2.0), (two, 2.5), (two, 1.0)):
        sends_whole.append(trial.sends_whole)
        loses.append(trial.loses(engines, seconds))
    assert sends_whole == [False, True, False, True, False, False]
    assert loses == [False, False, False, False, True, False]
    assert str(trial) == "2.50 s with deltas, 2.00 s without"


def test_deltas_that_take_less_time_are_kept():
    trial = Trial()
    assert not any(trial.loses(frozenset("a"), seconds) for seconds in (9.0, 2.0, 1.9, 30.0, 30.0))


def test_everything_on_demand():
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    sender = DeltaSender()
    for whole in (False, True, False):
        outgoing = sender.take(0, pack_bf16(weights), whole=whole)
        body = sender.body(1, 0, outgoing)
    assert body.nbytes < 2000, "the image was kept when everything was sent"
    assert sender.take(0, pack_bf16(weights), whole=True).delta is None
