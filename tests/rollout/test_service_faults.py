"""Engines that die while the main thread waits for a step, an evaluation or a push."""

from __future__ import annotations

import pytest
from support.engines import Engines, FakeClient
from support.service import GREEDY, positions, prompts, started, wait_until

from megatron_dapo.rollout.collect import SamplingCapReached
from megatron_dapo.rollout.errors import EngineDied, RequestFailed
from megatron_dapo.rollout.fleet import EngineFailure
from megatron_dapo.rollout.rollouts import WeightsNeeded


def test_a_dying_engine_in_an_evaluation_costs_its_own_requests_and_the_push_after_goes_through(services):
    """The old code sampled all of the evaluation again, and left what the survivor ran: its prefix cache
    could not be reset at the next push, which ended the run.
    """
    engines = Engines(num=2, rollout={"max_concurrency": 4})
    service = services(engines)
    dying, survivor = engines.client(0), engines.client(1)
    dying.failures = {4: [EngineDied("gone")]}
    survivor.delay = lambda prompt: 1 if prompt < 2 else 50
    groups = service.submit(prompts(8), GREEDY)
    assert positions(groups) == list(range(8))
    assert started(engines).count(4) == 2 and len(started(engines)) <= 8 + 4
    assert len(survivor.started) == len(set(survivor.started)), "the survivor's requests were sent again"
    assert service.push(1)
    assert survivor.running == 0 and survivor.resets == 2


def test_both_engines_die_in_an_evaluation_and_what_was_finished_is_kept(services):
    engines = Engines(num=2, rollout={"max_concurrency": 2})
    service = services(engines)
    engines.client(0).failures = {4: [EngineDied("gone")]}
    engines.client(1).failures = {5: [EngineDied("gone")]}
    finished = [engines.client(0).finished, engines.client(1).finished]
    groups, pushes = service.until_it_answers(lambda: service.submit(prompts(8), GREEDY))
    assert positions(groups) == list(range(8)) and 1 <= pushes <= 2
    before = {*finished[0], *finished[1]}
    assert before >= {0, 1, 2, 3}
    again = [client.started for clients in engines.clients.values() for client in clients[1:]]
    assert not before & {position for started_ in again for position in started_}


def test_an_engine_dies_in_a_step_and_the_step_goes_on_with_the_other(services):
    engines = Engines(num=2)
    service = services(engines)
    engines.client(0).failures = {0: [EngineDied("gone")]}
    assert positions(service.next_step(0).groups) == [0, 1, 2]
    assert service.request_failures["engine_died"] >= 1
    assert engines.client(1).started.count(0) == 1


def test_the_only_engine_dies_in_a_step_which_is_finished_after_a_push(services):
    engines = Engines(num=1)
    service = services(engines)
    old = engines.client(0)
    old.delay = lambda prompt: 1 + 10 * prompt
    old.failures = {1: [EngineDied("gone")]}
    with pytest.raises(WeightsNeeded):
        service.next_step(0)
    assert old.finished == [0]
    with pytest.raises(WeightsNeeded):
        service.next_step(0)
    service.push(0)
    assert positions(service.next_step(0).groups) == [0, 1, 2]
    assert sorted(engines.client(0).started) == [1, 2]


def test_a_step_whose_engine_died_equals_one_whose_engine_lived(services):
    def two_steps(failures: dict) -> list:
        engines = Engines(num=1)
        service = services(engines)
        engines.client(0).failures = failures
        steps = []
        for version in (0, 1):
            if version:
                service.push(version)
            collected, _ = service.until_it_answers(lambda version=version: service.next_step(version))
            steps.append(collected)
        return steps

    expected = two_steps({})
    assert two_steps({1: [EngineDied("gone")]}) == expected
    assert two_steps({2: [RequestFailed("a", "aborted")], 0: [RequestFailed("b", "aborted")]}) == expected


@pytest.mark.parametrize("phase", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_a_replica_that_fails_in_a_push_is_left_behind_and_restarted(services, phase):
    engines = Engines(num=2)
    service = services(engines)

    async def dies(*args) -> None:
        raise EngineDied("gone")

    setattr(engines.client(0), phase, dies)

    async def push_to(name: str, client: FakeClient) -> None:
        await client.start_weight_update()
        await client.update_weights([])
        await client.finish_weight_update("1")

    with service.paused() as replicas:
        errors = replicas.begin_call(replicas.push_targets(), push_to)()
        assert isinstance(errors["engine_0"], EngineDied) and errors["engine_1"] is None
        replicas.set_failed("engine_0", phase, errors["engine_0"])
        replicas.set_ready("engine_1", 1)
    assert positions(service.next_step(1).groups) == [0, 1, 2]
    assert engines.client(1).started
    wait_until(lambda: any(f"weights were pushed ({phase}): gone" in line for line in engines.messages))


def test_too_few_engines_end_a_step_and_an_evaluation_with_the_cause(services):
    engines = Engines(num=1, rollout={"max_restarts": 0})
    service = services(engines)
    engines.client(0).failures = {0: [EngineDied("gone")]}
    for ask in (lambda: service.next_step(0), lambda: service.submit(prompts(2), GREEDY)):
        with pytest.raises(EngineFailure, match=r"(?s)rollout\.min_engines=1.*gone.*root cause in the log"):
            ask()


def test_a_request_that_fails_everywhere_ends_an_evaluation_and_leaves_nothing_running(services):
    engines = Engines(num=2)
    service = services(engines)
    for index in (0, 1):
        engines.client(index).failures = {3: [RequestFailed("NaN", "not_a_number")] * 3}
        engines.client(index).held = {0, 1}
    with pytest.raises(EngineFailure, match="failed 3 times"):
        service.submit(prompts(4), GREEDY)
    service.pause()
    assert engines.client(0).running == engines.client(1).running == 0


def test_the_cap_is_raised_in_the_main_thread(services):
    service = services(Engines(), low=0.9, max_prompts=4)
    with pytest.raises(SamplingCapReached, match="only 0 of"):
        service.next_step(0)


def test_an_engine_that_died_in_a_push_and_is_up_again_has_no_part_in_it(services):
    """It holds no weights of this push, so it must not count as ready; nor has it failed."""
    engines = Engines(num=2)
    service = services(engines)
    called = []

    async def push_to(name: str, client: FakeClient) -> None:
        called.append((name, client))

    with service.paused() as replicas:
        names = replicas.push_targets()
        replicas.set_failed("engine_0", "send", EngineDied("gone"))
        wait_until(lambda: len(engines.clients["engine_0"]) == 2 and service.engines.states[0] == "stale")
        errors = replicas.begin_call(names, push_to)()
        assert called == [("engine_1", engines.client(1))]
        assert "failed meanwhile" in str(errors["engine_0"]) and errors["engine_1"] is None
        replicas.set_ready("engine_0", 1)
        replicas.set_failed("engine_0", "send", EngineDied("gone"))
        replicas.set_ready("engine_1", 1)
    assert service.engines.states == ["stale", "ready"]
    assert len(engines.clients["engine_0"]) == 2  # it was not restarted again
