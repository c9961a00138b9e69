"""Pushes by the exchange, on the ranks of a test (support/ranks.py starts them). Rank 0 stands for all
workers of the engines: it reads what the manifests say, as late as it may.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import xxhash

from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.rendezvous import without_prefix
from megatron_dapo.sync.delta import Trial
from megatron_dapo.sync.device_memory import PREFIX, GpuMemory, OpenedDeviceMemory
from megatron_dapo.sync.exchange import Exchange
from megatron_dapo.sync.host_link import HostLinks
from megatron_dapo.sync.manifest import Manifest
from megatron_dapo.sync.plan import Plan, Worker, make_plan
from megatron_dapo.sync.plan_report import link
from megatron_dapo.sync.regions import row_major
from megatron_dapo.sync.sinks import Sink, SinkTable
from megatron_dapo.sync.sources import Extent, LocalWeights, holdings
from megatron_dapo.sync.staging import Means
from megatron_dapo.sync.staging_memory import HostMemory
from megatron_dapo.weights.names import hf_shapes
from support.device_memory import ProcessOfMany
from support.planning import direct, empty, local_weights, make_workers
from support.weights import make_weights, small_model

DELAY_S = 0.01  # long beside the staging of a small chunk
WHOLE = "model.layers.0.self_attn.o_proj.weight"  # split by columns between tensor-parallel ranks
MODEL = small_model(
    num_layers=4, hidden_size=8, num_heads=8, num_kv_heads=4, head_dim=2, ffn_size=16, vocab_size=13
)
MODELS = {
    "dense": MODEL,
    "tied": dataclasses.replace(MODEL, tied=True),
    "experts": dataclasses.replace(MODEL, num_experts=4, qkv_bias=False, qk_norm=True),
    "big": dataclasses.replace(
        MODEL, hidden_size=256, num_kv_heads=8, head_dim=32, ffn_size=1024, vocab_size=1024
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """hosts: of the ranks. engine_hosts: on each of them, by default those of the ranks, stands an engine of
    one worker and one of two. dtype: theirs. changes: the share of the elements that are others in each push.
    on_gpu: as on GPUs, in memory of the host. timeout_s: that a host without ranks may let them wait.
    """

    model: str
    layout: Layout
    hosts: str
    engine_hosts: str = ""
    dtype: str = "float32"
    chunk_bytes: int = 2000
    delta: bool = False
    changes: float = 1.0
    on_gpu: bool = False
    timeout_s: float = 60.0


# --- the engines ------------------------------------------------------------------------


def engines(case: Case) -> list[Worker]:
    """Those called tp1 have a tensor that is sent whole, those called tp2 have transposed parameters."""
    model, hosts = MODELS[case.model], sorted(set(case.engine_hosts or case.hosts))
    made = []
    for tp in (1, 2):
        for worker in make_workers(model, hosts, tp=tp, dtype=case.dtype, transpose=tp == 2):
            table = _with_whole(worker.table) if tp == 1 else worker.table
            made.append(dataclasses.replace(worker, engine=f"tp{tp} on {worker.host}", table=table))
    return made


def _with_whole(table: SinkTable) -> SinkTable:
    sinks = tuple(sink for sink in table.sinks if sink.source != WHOLE)
    return dataclasses.replace(table, sinks=sinks, whole=(WHOLE,), computed={WHOLE: "neg"})


def make_exchange(case: Case) -> Exchange:
    means = Means(
        rank=dist.get_rank(),
        control=dist.group.WORLD,
        data=dist.new_group() if case.on_gpu else dist.group.WORLD,
        memory=GpuMemory(torch.device("cpu"), runtime()) if case.on_gpu else HostMemory(),
        delta=case.delta,
        store=without_prefix(dist.distributed_c10d._get_default_store().clone()),
        timeout_s=case.timeout_s,
    )
    held = holdings(MODELS[case.model], case.layout)
    return Exchange(means, hosts=case.hosts, held=held, chunk_bytes=case.chunk_bytes, dtype=case.dtype)


@cache
def runtime() -> ProcessOfMany:
    """Of this process's GPU that is none."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    return ProcessOfMany(Path(folder[0]))


def plan_of(case: Case) -> Plan:
    held = holdings(MODELS[case.model], case.layout)
    return make_plan(engines(case), held, case.hosts, chunk_bytes=case.chunk_bytes, dtype=case.dtype)


class Reader:
    """The workers of all engines: their parameters, and how often each element was written."""

    def __init__(self, workers: Sequence[Worker], model: ModelSpec) -> None:
        self._workers, self._shapes = workers, hf_shapes(model)
        self.parameters = [empty(worker.table) for worker in workers]
        self.writes = [empty(worker.table) for worker in workers]
        for number, worker in enumerate(workers):
            for name in worker.table.whole:
                self.parameters[number][name] = torch.zeros(self._shapes[name])
                self.writes[number][name] = torch.zeros(self._shapes[name])

    def read(self, manifests: Mapping[str, list[Manifest]], version: int, verified: bool) -> None:
        for engine, of_engine in manifests.items():
            for rank, manifest in enumerate(of_engine):
                [number] = [n for n, w in enumerate(self._workers) if (w.engine, w.rank) == (engine, rank)]
                manifest = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
                table = self._workers[number].table
                assert (manifest.version, manifest.table) == (version, table.digest)
                assert bool(manifest.checksums) == (verified and manifest.num_bytes > 0)
                try:
                    chunk = read_chunk(manifest)
                except FileNotFoundError:  # its carrier has died; the elements will be missed, or it is lost
                    continue
                for checksum in manifest.checksums:  # together they are the whole chunk: Manifest checks it
                    part = chunk[checksum.offset :][: checksum.num_bytes]
                    assert xxhash.xxh3_64(part).hexdigest() == checksum.xxh3
                self._scatter(number, manifest, chunk)

    def _scatter(self, number: int, manifest: Manifest, chunk: bytearray) -> None:
        table = self._workers[number].table
        for piece in manifest.pieces:
            if piece.sink is None:
                name, dtype = piece.source, manifest.dtype_whole
                whole = row_major(self._shapes[name])
                sink = Sink(name, name, (0,) * len(whole), self._shapes[name], 0, whole)
            else:
                sink = table.sinks[piece.sink]
                name, dtype = sink.parameter, table.dtypes[sink.parameter]
            to = sink.part(piece.start, piece.size)
            values = torch.frombuffer(
                chunk, dtype=getattr(torch, dtype), offset=piece.offset, count=to.num_elements
            )
            region = (to.size, to.stride, to.offset)
            self.parameters[number][name].as_strided(*region).copy_(values.view(to.size))
            self.writes[number][name].as_strided(*region).add_(1)

    def wrong(self, weights: Mapping[str, torch.Tensor], left_out: Collection[str] = ()) -> list[str]:
        """Parameters that a direct fill makes others of, or with elements not written exactly once; without
        the engines `left_out`.
        """
        found = []
        for worker, parameters, writes in zip(self._workers, self.parameters, self.writes, strict=True):
            if worker.engine in left_out:
                continue
            expected = direct(worker.table, weights)
            for name in worker.table.whole:
                dtype = getattr(torch, next(iter(worker.table.dtypes.values())))
                expected[name] = weights[name].to(dtype).float()
            for name, values in expected.items():
                if not torch.equal(parameters[name], values) or not (writes[name] == 1).all():
                    found.append(f"{worker.engine}, {worker.rank}: {name}")
        return found


def read_chunk(manifest: Manifest) -> bytearray:
    """What the manifest's memory holds now, in whatever process it is."""
    if manifest.path.startswith(PREFIX):
        memory = OpenedDeviceMemory(manifest.path, runtime())
        chunk = bytearray(memory.bytes[manifest.offset :][: manifest.num_bytes].numpy())
        memory.close()
        return chunk
    with open(manifest.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        return bytearray(memory[manifest.offset : manifest.offset + manifest.num_bytes])


@contextmanager
def counting_sends() -> Iterator[list[int]]:
    """The bytes of every message between ranks that this rank sends."""
    sizes, batch, send = [], dist.batch_isend_irecv, HostLinks.send

    def counted(operations: list[dist.P2POp]) -> Any:
        sizes.extend(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return batch(operations)

    def counted_to_host(
        links: HostLinks, host: str, begin: int, size: int, body: torch.Tensor, fingerprint: int
    ) -> Any:
        sizes.append(body.nbytes)
        return send(links, host, begin, size, body, fingerprint)

    with (
        mock.patch.object(dist, "batch_isend_irecv", counted),
        mock.patch.object(HostLinks, "send", counted_to_host),
    ):
        yield sizes


def on_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class SlowWeights(LocalWeights):
    """`is_late`: the next access takes a while."""

    def __init__(self, weights: LocalWeights) -> None:
        self._parts, self.is_late = weights._parts, False

    def view(self, name: str, start: Extent, size: Extent) -> torch.Tensor:
        if self.is_late:
            time.sleep(DELAY_S)
        self.is_late = False
        return super().view(name, start, size)


class Pushes:
    """Pushes of one case, each of weights of its own; all weights are there before the first push, so that no
    rank is held up between two of them.
    """

    def __init__(self, case: Case) -> None:
        self.model, self.workers = MODELS[case.model], engines(case)
        self.exchange = make_exchange(case)
        self.exchange.set_workers(self.workers)
        self.weights = versions(self.model, case.changes)
        self.local = {
            version: SlowWeights(local_weights(self.model, case.layout, dist.get_rank(), weights))
            for version, weights in self.weights.items()
        }
        self.wrong: list[str] = []
        self.sent: list[int] = []  # bytes to other hosts, by push
        self.manifests: list[list[Mapping[str, list[Manifest]]]] = []  # by push and round

    def push(self, version: int, *, verify: bool = False, left_out: str = "") -> dict[str, str]:
        """To all engines but one; returns those that were lost. Rank 0 reads a round at once, though the last
        rank is late with it, and again when the next one is staged, after a delay: no rank may have begun
        with the one after that.
        """
        names, rank = {worker.engine for worker in self.workers} - {left_out}, dist.get_rank()
        early, late = Reader(self.workers, self.model), Reader(self.workers, self.model)
        local, staged = self.local[version], []
        rounds = self.exchange.rounds(local, version, engines=names, verify=verify)
        with counting_sends() as sizes:
            while True:
                local.is_late = rank == dist.get_world_size() - 1
                manifests = next(rounds, None)
                if rank == 0 and manifests is not None:
                    early.read(manifests, version, verify)
                if rank == 0 and staged:
                    time.sleep(DELAY_S)
                    still = {k: v for k, v in staged[-1].items() if k not in self.exchange.lost}
                    late.read(still, version, verify)
                if manifests is None:
                    break
                assert set(manifests) == (names - self.exchange.lost.keys() if rank == 0 else set())
                staged.append(manifests)
        self.manifests.append(staged)
        self.sent.append(sum(sizes))
        for reader in (early, late) if rank == 0 else ():
            self.wrong += reader.wrong(self.weights[version], {left_out, *self.exchange.lost})
        return self.exchange.lost


def versions(model: ModelSpec, changes: float) -> dict[int, dict[str, torch.Tensor]]:
    """Weights by version; from one to the next this share of the elements changes."""
    made = {1: make_weights(model, seed=1)}
    chance = torch.Generator().manual_seed(0)
    for version in (2, 3, 4):
        new, old = make_weights(model, seed=version), made[version - 1]
        made[version] = {
            name: torch.where(torch.rand(old[name].shape, generator=chance) < changes, new[name], old[name])
            for name in new
        }
    return made


def bytes_between_hosts(plan: Plan, left_out: str = "") -> int:
    return sum(
        message.parcel.num_bytes
        for message in plan.messages
        if link(plan, message) == "between_hosts" and plan.workers[message.worker].engine != left_out
    )


def without_trial(job: Callable[[], Any]) -> Any:
    """What the job returns where deltas are sent from the second push on, whatever time they take."""
    with mock.patch.object(Trial, "loses", return_value=False):
        return job()


def three_pushes(case: Case) -> dict[str, Any]:
    pushes, plan = Pushes(case), plan_of(case)
    # NCCL does not look at tags
    untagged = mock.patch.object(dist, "P2POp", lambda *a, tag, p2p=dist.P2POp, **k: p2p(*a, **k))
    with untagged if case.on_gpu else nullcontext():
        for version in (1, 2, 3):
            pushes.push(version, verify=version == 2)
    pushes.exchange.set_workers([])
    return {
        "wrong": pushes.wrong,
        "rounds": [len(rounds) for rounds in pushes.manifests],
        "planned rounds": len(plan.rounds),
        "sent": [sum(of_ranks) for of_ranks in zip(*on_all_ranks(pushes.sent), strict=True)],
        "planned": bytes_between_hosts(plan),
    }
