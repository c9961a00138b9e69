"""Tokens that the engine core keeps back: they come out whole, in order, in time, of the right version."""

from __future__ import annotations

import queue
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
from vllm.v1.outputs import LogprobsLists

from megatron_dapo.sync.vllm import outputs as module
from megatron_dapo.sync.vllm.outputs import ATTRIBUTE, HeldOutputs

OURS, OTHERS = "megatron_dapo-a", "generate-tokens-b"


def output(name: str = OURS, token: int = 0, **changes) -> EngineCoreOutput:
    """One token as vLLM's scheduler puts it out; its log-probability is minus its number."""
    lists = LogprobsLists(
        np.array([[token]], np.int32), np.array([[-token]], np.float32), np.array([1], np.int32)
    )
    return EngineCoreOutput(request_id=name, new_token_ids=[token], new_logprobs=lists, **changes)


def step(*outputs: EngineCoreOutput, client: int = 0, **changes) -> dict[int, EngineCoreOutputs]:
    return {client: EngineCoreOutputs(outputs=list(outputs), **changes)}


def content(one: EngineCoreOutput) -> tuple:
    """Tokens and log-probabilities, which belong together."""
    assert one.new_logprobs is not None
    logprobs = one.new_logprobs.logprobs
    assert logprobs.shape == one.new_logprobs.logprob_token_ids.shape == (len(one.new_token_ids), 1)
    assert one.new_logprobs.logprob_token_ids[:, 0].tolist() == one.new_token_ids
    return one.request_id, one.new_token_ids, (-logprobs[:, 0]).tolist(), one.finish_reason


def test_tokens_wait_for_the_end_of_their_sequence():
    held = HeldOutputs()
    for token in (1, 2):
        outputs = step(output(token=token))
        held.hold(outputs, now=0.0)
        assert outputs == {}  # nothing is sent
    outputs = step(output(token=3, finish_reason=FinishReason.STOP, stop_reason=3))
    held.hold(outputs, now=0.1)
    [one] = outputs[0].outputs
    assert content(one) == (OURS, [1, 2, 3], [1, 2, 3], FinishReason.STOP)
    assert one.stop_reason == 3
    assert held.take() == {}


def tokens_out(held: HeldOutputs, now: float, *outputs: EngineCoreOutput) -> list[list[int]]:
    """What a step's message has."""
    messages = step(*outputs)
    held.hold(messages, now)
    return [one.new_token_ids for message in messages.values() for one in message.outputs]


def test_tokens_wait_no_longer_than_they_may_and_the_oldest_leaves_at_each_beat(monkeypatch):
    monkeypatch.setattr(module, "HOLD_S", 4.0)
    monkeypatch.setattr(module, "BEAT_S", 1.0)
    held = HeldOutputs()
    a, b, c = (f"{OURS}-{name}" for name in "abc")
    assert tokens_out(held, 5.0, output(a, 1), output(b, 11), output(c, 21)) == []
    assert tokens_out(held, 5.9, output(a, 2), output(b, 12), output(c, 22)) == []
    assert tokens_out(held, 6.0, output(a, 3), output(b, 13)) == [[1, 2, 3]]  # a beat: the oldest alone
    assert tokens_out(held, 6.9, output(a, 4), output(b, 14)) == []
    assert tokens_out(held, 7.0) == [[11, 12, 13, 14]]
    assert tokens_out(held, 7.1, output(b, 15)) == []
    # c has waited for 4 s and goes; a came at 6.9, b at 7.1, and there was a beat
    assert tokens_out(held, 9.0, output(a, 5), output(b, 16)) == [[21, 22]]
    assert tokens_out(held, 11.0) == [[4, 5]]
    assert tokens_out(held, 11.2) == [[15, 16]]


def test_each_bundle_goes_to_the_process_that_asked():
    held = HeldOutputs()
    held.hold(step(output(token=1), client=1), now=0.0)
    other = step(output("megatron_dapo-c", token=9), client=0)
    held.hold(other, now=10.0)  # a step of another process alone
    assert [content(one)[:2] for one in other[1].outputs] == [(OURS, [1])]
    assert list(other) == [1]


def test_requests_of_others_are_left_alone():
    held = HeldOutputs()
    mine, foreign = output(token=1), output(OTHERS, token=2)
    outputs = step(mine, foreign)
    held.hold(outputs, now=0.0)
    assert outputs[0].outputs == [foreign]


@pytest.mark.parametrize("field", ["scheduler_stats", "finished_requests"])
def test_a_message_that_says_something_else_is_sent(field):
    value = {"scheduler_stats": SchedulerStats(), "finished_requests": {"x"}}[field]
    held = HeldOutputs()
    outputs = step(output(), **{field: value})
    held.hold(outputs, now=0.0)
    assert outputs[0].outputs == [] and getattr(outputs[0], field) is value


def test_what_cannot_be_merged_goes_out_as_it_is_behind_what_was_kept():
    held = HeldOutputs()
    held.hold(step(output(token=1)), now=0.0)
    odd = output(token=2, kv_transfer_params={"a": 1})
    outputs = step(odd)
    held.hold(outputs, now=0.0)
    assert [content(one)[:2] for one in outputs[0].outputs] == [(OURS, [1]), (OURS, [2])]
    assert outputs[0].outputs[1] is odd


def test_the_first_outputs_news_of_the_prompt_are_kept():
    stats = PrefillStats()
    held = HeldOutputs()
    queued = output(token=1, prefill_stats=stats, events=["queued"])  # type: ignore[list-item]
    held.hold(step(queued), now=0.0)
    held.hold(step(output(token=2, events=["preempted"])), now=0.0)  # type: ignore[list-item]
    [one] = held.take()[0]
    assert one.prefill_stats is stats and one.events == ["queued", "preempted"]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(0, 3)), max_size=40))
def test_nothing_is_lost_doubled_or_reordered(steps):
    """Random sequences (numbers 0 to 3; even ones are ours) get their tokens and end at random times."""
    held, now = HeldOutputs(), 0.0
    sent: dict[str, list[int]] = {}
    expected: dict[str, list[int]] = {}
    generation = [0] * 4
    for token, (number, ends, seconds) in enumerate(steps):
        now += seconds
        name = f"{OURS if number % 2 == 0 else OTHERS}-{number}-{generation[number]}"
        expected.setdefault(name, []).append(token)
        outputs = step(output(name, token, finish_reason=FinishReason.LENGTH if ends else None))
        held.hold(outputs, now)
        generation[number] += ends
        for one in [one for message in outputs.values() for one in message.outputs]:
            sent.setdefault(one.request_id, []).extend(content(one)[2])
            if one.finish_reason is not None:
                assert sent[one.request_id] == expected[one.request_id]
    for one in held.take().get(0, []):
        sent.setdefault(one.request_id, []).extend(content(one)[2])
    assert sent == expected


# --- in vLLM's engine core


@pytest.fixture
def core(monkeypatch):
    """What an engine core is to the methods that are wrapped, with its output queue."""
    for owner, name in (
        (EngineCore, "_attach_weight_version"),
        (EngineCore, "_finish_pause"),
        (Scheduler, "make_stats"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # which puts it back at the end
    monkeypatch.setattr(module.log, "warning", lambda text: pytest.fail(text))
    module.hold_outputs()
    executor = SimpleNamespace(collective_rpc=lambda name: None)
    yield SimpleNamespace(
        **{ATTRIBUTE: None}, _weight_version="1", output_queue=queue.Queue(), model_executor=executor
    )
    delattr(EngineCore, ATTRIBUTE)


def sent_before(core: SimpleNamespace) -> list[tuple[str | None, list[int]]]:
    """(version, tokens) of what went into the output queue directly."""
    messages = [core.output_queue.get_nowait() for _ in range(core.output_queue.qsize())]
    assert all(client == 0 for client, _ in messages)
    return [(message.weight_version, one.new_token_ids) for _, message in messages for one in message.outputs]


def test_a_pause_sends_what_is_kept_before_it_is_confirmed(core):
    for token in (1, 2):
        outputs = step(output(token=token))
        EngineCore._attach_weight_version(core, outputs)
        assert outputs == {}
    EngineCore._finish_pause(core, False)
    assert sent_before(core) == [("1", [1, 2])]


def test_a_bundle_is_of_one_version(core):
    EngineCore._attach_weight_version(core, step(output(token=1)))
    core._weight_version = "2"
    outputs = step(output(token=2, finish_reason=FinishReason.STOP))
    EngineCore._attach_weight_version(core, outputs)
    assert sent_before(core) == [("1", [1])]
    assert outputs[0].weight_version == "2" and outputs[0].outputs[0].new_token_ids == [2]


def test_an_engine_core_that_never_stepped_can_pause(core):
    EngineCore._finish_pause(core, False)
    assert sent_before(core) == []


def test_statistics_are_made_seldom_and_at_the_end(monkeypatch):
    times: list[float] = []
    monkeypatch.setattr(module.time, "monotonic", lambda: times[-1])
    monkeypatch.setattr(module, "BEAT_S", 0.25)
    make_stats = module._seldom(lambda scheduler, *args, **kwargs: "stats")
    counts = [(3, 0)]
    scheduler = SimpleNamespace(get_request_counts=lambda: counts[-1])

    def made(at: float, *args, **kwargs) -> bool:
        times.append(at)
        return make_stats(scheduler, *args, **kwargs) is not None

    assert [made(at, None, perf_stats=None) for at in (0.0, 0.1, 0.2, 0.3, 0.4)] == [True, 0, 0, True, 0]
    assert made(0.41, None, perf_stats="of this step alone")
    assert not made(0.42)
    counts.append((0, 0))
    assert made(0.43)


@pytest.mark.parametrize("missing", ["_attach_weight_version", "_finish_pause"])
def test_another_vllm_is_left_alone_with_a_warning(monkeypatch, missing):
    words = []
    monkeypatch.delattr(EngineCore, ATTRIBUTE, raising=False)
    monkeypatch.setattr(EngineCore, missing, lambda self, something_else: None)
    monkeypatch.setattr(module.log, "warning", words.append)
    before = dict(vars(EngineCore))
    module.hold_outputs()
    assert "another shape" in words[0] and dict(vars(EngineCore)) == before
