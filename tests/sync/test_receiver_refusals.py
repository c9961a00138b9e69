"""Updates of a worker in this process that are given up, incomplete, damaged or wrong: refused with the
reason, and the next one is as good as a fresh load."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from support.push import checkpoint, staged
from support.receiving import Worker, computed, differing, make_two, worker

from megatron_dapo.sync.plan import Plan
from megatron_dapo.sync.regions import Region

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
BIAS = "model.layers.1.self_attn.qkv_proj.bias"
DOWN = "model.layers.1.mlp.down_proj.weight"


@dataclass(frozen=True)
class Case:
    """A worker that has loaded the first of two tied models, which every test may leave in any state."""

    worker: Worker
    first: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]
    plan: Plan
    before: dict[str, torch.Tensor]  # what it computed then

    def check(self) -> None:
        """The worker is as good as new after one more update."""
        self.worker.push(self.plan, self.first, 99)
        assert self.worker.as_loaded("v99") == self.worker.as_loaded("load")
        assert differing(computed(self.worker.model), self.before) == set()


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("models")
    folders = make_two(folder, "qwen2", tied=True)
    first, second = map(checkpoint, folders)
    with worker(folders[0], folder / "digests") as made:
        yield Case(made, first, second, made.plan(first), computed(made.model))


def test_a_tied_head_that_is_not_packed_again_computes_with_the_old_one(case, monkeypatch):
    from megatron_dapo.sync.vllm import reload

    live = case.worker
    live.push(case.plan, case.second, 1)
    with monkeypatch.context() as patch:
        patch.setattr(reload, "tied_layers", lambda model: [])
        patch.setattr(reload, "missing_parameters", lambda model, tied: [])
        live.push(case.plan, case.first, 2)
    assert live.as_loaded("v2") == live.as_loaded("load")  # digests as loaded do not tell
    assert differing(computed(live.model), case.before) == {"lm_head applied"}
    case.check()


@pytest.mark.parametrize("all_but", [False, True])
def test_an_update_that_is_given_up_leaves_nothing(case, all_but):
    live, some = case.worker, {Q_PROJ, GATE}
    live.receiver.start_weight_update()
    live.send(case.plan, case.second, 1, names=case.second.keys() - some if all_but else some)
    case.check()


def test_a_table_that_is_told_again_changes_nothing(case):
    live = case.worker
    live.push(case.plan, case.second, 1)
    live.receiver.start_weight_update()
    live.send(case.plan, case.first, 2, names={Q_PROJ})
    assert live.sink_table(case.first) == case.plan.workers[0].table
    live.send(case.plan, case.first, 2, names=case.first.keys() - {Q_PROJ})
    live.receiver.finish_weight_update()
    assert differing(computed(live.model), case.before) == set()


def test_what_is_missing_is_named(case):
    live, embedding = case.worker, "model.embed_tokens.weight"
    live.receiver.start_weight_update()
    with pytest.raises(RuntimeError, match=r"update None is incomplete: model\.embed_tokens.* and 6 more"):
        live.receiver.finish_weight_update()
    live.send(case.plan, case.first, 1, names=case.first.keys() - {Q_PROJ, embedding})
    with pytest.raises(RuntimeError) as error:
        live.receiver.finish_weight_update()
    assert str(error.value) == (
        f"weight update 1 is incomplete: {embedding} got 0 of {case.first[embedding].numel()} elements; "
        "model.layers.0.self_attn.qkv_proj.weight got 16384 of 32768 elements"
    )
    live.send(case.plan, case.first, 1, names={Q_PROJ, embedding})
    live.receiver.finish_weight_update()
    assert differing(computed(live.model), case.before) == set()


def test_what_comes_twice_is_refused(case):
    live = case.worker
    live.receiver.start_weight_update()
    live.send(case.plan, case.first, 1, names={Q_PROJ})
    with pytest.raises(ValueError, match=r"q_proj\.weight\[.* for .*qkv_proj\.weight came twice"):
        live.send(case.plan, case.first, 1, names={Q_PROJ})


def test_a_worker_without_a_table_refuses(case, monkeypatch):
    monkeypatch.setattr(case.worker.receiver, "_next", None)
    with pytest.raises(RuntimeError, match="no sink table; call megatron_dapo_sink_table"):
        case.worker.receiver.start_weight_update()


def test_a_chunk_may_bring_a_worker_nothing(case):
    live = case.worker
    live.receiver.start_weight_update()
    live.send(case.plan, case.first, 1, names=set())
    with pytest.raises(ValueError, match="update 1 received a chunk of version 2"):
        live.send(case.plan, case.first, 2, names=set())


def test_a_chunk_of_another_table_is_refused(case):
    case.worker.receiver.start_weight_update()
    rounds = staged(case.plan, case.first, 1)
    [manifest] = next(rounds)
    with pytest.raises(ValueError, match="tp rank 0, pp rank 0 received a chunk for the sink table 0000"):
        case.worker.receive(dataclasses.replace(manifest, table="0000"))


def test_a_changed_byte_is_noticed(case):
    case.worker.receiver.start_weight_update()
    rounds = staged(case.plan, case.first, 1)
    [manifest] = next(rounds)
    begin = manifest.checksums[2].offset
    with open(manifest.path, "r+b") as file:
        file.seek(manifest.offset + begin + 5)
        file.write(b"?")
    with pytest.raises(ValueError, match=rf"pp rank 0: bytes {begin} to .* of weight update 1 are not those"):
        case.worker.receive(manifest)
    case.check()


@pytest.mark.parametrize("name", [BIAS, DOWN])
def test_elements_in_the_wrong_place_are_noticed(case, monkeypatch, name):
    from megatron_dapo.sync.vllm import reload

    live, write, shape = case.worker, reload.write, case.plan.workers[0].table.shapes[name]
    plan = live.plan(case.first, chunk_bytes=1 << 12)  # no chunk has all of a layer: elements are copied

    def write_one_before(param, region: Region, values) -> None:
        if tuple(param.shape) == shape and region.offset:
            region = dataclasses.replace(region, offset=region.offset - 1)
        write(param, region, values)

    with monkeypatch.context() as patch:
        patch.setattr(reload, "write", write_one_before)
        live.push(plan, case.first, 2, verify=False)  # not noticed
        assert live.as_loaded("v2")[name] != live.as_loaded("load")[name]
        with pytest.raises(ValueError, match=rf"{name[-12:]} does not hold what was sent for it"):
            live.push(plan, case.first, 3)
    case.check()


def test_a_weight_that_is_read_from_the_wrong_place_is_noticed(case, monkeypatch):
    from megatron_dapo.sync.vllm import reload

    like = reload._like
    with monkeypatch.context() as patch:
        patch.setattr(reload, "_like", lambda parameter, values: like(parameter, values.roll(1)))
        with pytest.raises(ValueError, match="proj.weight does not hold what was sent for it"):
            case.worker.push(case.worker.plan(case.first, chunk_bytes=1 << 20), case.first, 2)
    case.check()


def test_pieces_that_were_never_told_are_refused(case):
    case.worker.receiver.start_weight_update()
    rounds = staged(case.plan, case.first, 1, names={Q_PROJ})
    [manifest] = next(manifests for manifests in rounds if manifests[0].pieces)
    with pytest.raises(ValueError, match="pp rank 0 was never told the pieces of digest 0000000000000000;"):
        case.worker.receive(dataclasses.replace(manifest, pieces=None, digest="0" * 64))
    case.check()


def test_pieces_are_forgotten_with_their_table(case):
    live, table = case.worker, case.plan.workers[0].table
    live.push(case.plan, case.second, 1)
    live.push(case.plan, case.first, 2, brief=True)
    assert live.as_loaded("v2") == live.as_loaded("load")
    assert differing(computed(live.model), case.before) == set()
    live.receiver.use_table(table, {})
    live.push(case.plan, case.first, 3, brief=True)
    live.receiver.use_table(dataclasses.replace(table, tp=2), {})
    live.receiver.start_weight_update()
    live.receiver.use_table(table, {})
    with pytest.raises(ValueError, match="was never told the pieces"):
        live.push(case.plan, case.first, 4, brief=True)
    case.check()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sink": 10_000}, "a piece is of 10000, which is no sink"),
        ({"sink": None, "source": "x"}, "a piece is of 'x', which is no sink"),
        ({"start": (1000, 0)}, "no part of the sink's box"),
        ({"offset": 2}, "must be aligned and end in the chunk"),
        ({"size": (128, 128)}, "must be aligned and end in the chunk"),
    ],
)
def test_a_piece_that_makes_no_sense_is_refused(case, changed, words):
    case.worker.receiver.start_weight_update()
    rounds = staged(case.plan, case.first, 1, names={Q_PROJ}, verify=False)
    [manifest] = next(manifests for manifests in rounds if manifests[0].pieces)
    assert manifest.pieces
    broken = dataclasses.replace(manifest.pieces[0], **changed)
    with pytest.raises(ValueError, match=words):
        case.worker.receive(dataclasses.replace(manifest, pieces=(broken,), digest=""))


def test_a_file_that_is_too_short_is_refused(case):
    case.worker.receiver.start_weight_update()
    rounds = staged(case.plan, case.first, 1)
    [manifest] = next(rounds)
    with pytest.raises(ValueError, match=r"offset=1048576, num_bytes=\d+ must lie in the \d+ bytes of"):
        case.worker.receive(dataclasses.replace(manifest, offset=1 << 20))


def test_a_count_that_vllm_does_not_share_is_refused(case):
    receiver, table = case.worker.receiver, case.plan.workers[0].table
    sinks = tuple(sink for sink in table.sinks if sink.source != Q_PROJ)
    receiver.use_table(dataclasses.replace(table, sinks=sinks), {})
    with pytest.raises(
        RuntimeError, match=r"16384 elements of .*qkv_proj\.weight, of which vLLM loads 32768"
    ):
        receiver.start_weight_update()
    receiver.use_table(table, {})
    case.check()
