"""The receiving end of a weight push, inside each vLLM worker.

Chunks of exactly this worker's elements arrive in memory shared with their carrier (sync/exchange.py), each
described by a Manifest. Where they go says the worker's sink table. They are written inside vLLM's layerwise
reload, so it also works where vLLM repacks weights (CPU kernels, FP8).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from megatron_dapo.environment import DIGEST_VARIABLE
from megatron_dapo.sync.arrivals import Arrivals
from megatron_dapo.sync.manifest import Manifest, Piece
from megatron_dapo.sync.sinks import Sink, SinkTable
from megatron_dapo.sync.vllm import reload
from megatron_dapo.sync.vllm.carrier_memory import CarrierMemory
from megatron_dapo.sync.vllm.digest import UpdateDigests

NAMES_IN_ERRORS = 10


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing is agreed beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """vLLM's name for what one `/update_weights` call brings: for us, the manifest of one chunk."""

    manifest: Manifest


class WeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """use_table, then for every update: start -> receive chunk after chunk -> finish. After an error, start
    again and send all chunks.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False
    _next: tuple[SinkTable, str, Mapping[str, tuple[int, ...]]] | None = None  # use_table's, and the digest
    _table_digest = ""
    _digests: UpdateDigests | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._memory = CarrierMemory()
        self._pieces: dict[str, tuple[Piece, ...]] = {}  # by digest, of chunks of the table in use

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def parse_update_info(self, update_dict: dict[str, Any]) -> UpdateInfo:
        """ValueError names a field of the manifest that makes no sense."""
        return UpdateInfo(Manifest.from_json(update_dict))

    def use_table(self, table: SinkTable, whole_shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Load by this table from the next update on. whole_shapes: of the tensors that it names `whole`."""
        self._next = (table, table.digest, whole_shapes)

    def start_weight_update(self) -> None:
        """Begin an update; one that was begun and not finished is given up."""
        if self._next is None:
            raise RuntimeError("this worker has no sink table; call megatron_dapo_sink_table before a push")
        self._drop_digests()
        reload.abandon_update(self.model)
        self._memory.release()
        before, (self._table, self._table_digest, self._whole_shapes) = self._table_digest, self._next
        if before != self._table_digest:
            self._pieces.clear()
        self._arrivals = Arrivals(self._table, self._whole_shapes)
        self._whole: dict[str, torch.Tensor] = {}  # sent whole, and not complete yet
        self._version: int | None = None
        if os.environ.get(DIGEST_VARIABLE):
            self._digests = UpdateDigests(self.model)
        initialize_layerwise_reload(self.model)
        if current_platform.is_cpu():
            reload.forget_packed_experts(self.model)
        self._rows = reload.RowLoader(self.model, self._table)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load one chunk. vLLM waits for the device before it answers, and then nobody reads the chunk's
        memory, which its carrier fills anew.

        ValueError for a chunk of another table, of another version than the update's or with another
        checksum, for pieces that are named and were never told, for elements that are sent twice, and in a
        push with checksums for elements that are not where they belong.
        """
        manifest = update_info.manifest
        if manifest.table != self._table_digest:
            raise ValueError(
                f"{self._worker} received a chunk for the sink table {manifest.table[:16]}, but loads by "
                f"{self._table_digest[:16]}; trainer and engine must agree on one before a push"
            )
        if self._version not in (None, manifest.version):
            raise ValueError(f"weight update {self._version} received a chunk of version {manifest.version}")
        self._version = manifest.version
        if not (pieces := self._pieces_of(manifest)):
            return
        chunk = self._memory.chunk(manifest)
        self._check(manifest, chunk)
        rows: list[tuple[Sink, torch.Tensor]] = []
        for number, piece in enumerate(pieces):
            sink = self._arrivals.take(piece)
            dtype = manifest.dtype_whole if piece.sink is None else self._table.dtypes[sink.parameter]
            values = view(chunk, piece, getattr(torch, dtype), f"Manifest.pieces[{number}]")
            if piece.sink is None:
                self._take_whole(sink, values)
            else:
                rows.append((sink, values))
        self._rows.load(rows, verify=bool(manifest.checksums))

    def _pieces_of(self, manifest: Manifest) -> tuple[Piece, ...]:
        if manifest.pieces is not None:
            self._pieces[manifest.digest] = manifest.pieces
        elif manifest.digest not in self._pieces:
            raise ValueError(
                f"{self._worker} was never told the pieces of digest {manifest.digest[:16]}; the first push "
                f"of a plan to an engine must bring them"
            )
        return self._pieces[manifest.digest]

    def _check(self, manifest: Manifest, chunk: torch.Tensor) -> None:
        for checksum in manifest.checksums:
            begin, end = checksum.offset, checksum.offset + checksum.num_bytes
            if xxhash.xxh3_64_hexdigest(chunk[begin:end].cpu().numpy().data) != checksum.xxh3:
                raise ValueError(
                    f"{self._worker}: bytes {begin} to {end} of a chunk of weight update {manifest.version} "
                    f"are not those that were sent"
                )

    def _take_whole(self, part: Sink, values: torch.Tensor) -> None:
        """Put it into its tensor; when this is complete the model's own loader takes it."""
        name = part.source
        if name not in self._whole:
            self._whole[name] = torch.empty(self._whole_shapes[name], dtype=values.dtype)
        self._whole[name].as_strided(part.size, part.stride, part.offset).copy_(values)
        if self._arrivals.is_complete(name):
            model: Any = self.model
            model.load_weights(iter([(name, self._whole.pop(name))]))

    def finish_weight_update(self) -> None:
        """Put the update into use.

        RuntimeError names what is missing; more chunks may follow then, and another finish.
        """
        tied = reload.tied_layers(self.model)
        if missing := self._arrivals.missing() or reload.missing_parameters(self.model, tied):
            more = f" and {len(missing) - NAMES_IN_ERRORS} more" if len(missing) > NAMES_IN_ERRORS else ""
            raise RuntimeError(
                f"weight update {self._version} is incomplete: {'; '.join(missing[:NAMES_IN_ERRORS])}{more}"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        digests = self._drop_digests()
        for layer in tied:
            # vLLM reloads only one of the layers that share a parameter; the other keeps what it packed from
            # the old one.
            layer.quant_method.process_weights_after_loading(layer)
        if digests and self._version is not None:
            digests.write(self._version)

    def shutdown(self) -> None:
        self._memory.close()

    @property
    def _worker(self) -> str:
        return f"the worker of tp rank {self._table.tp_rank}, pp rank {self._table.pp_rank}"

    def _drop_digests(self) -> UpdateDigests | None:
        """Stop watching the layers of this update."""
        digests, self._digests = self._digests, None
        if digests:
            digests.detach()
        return digests


def view(chunk: torch.Tensor, piece: Piece, dtype: torch.dtype, where: str) -> torch.Tensor:
    """The values of a piece, where they lie. ValueError if some lie outside of the chunk, or not aligned."""
    end = piece.offset + math.prod(piece.size) * dtype.itemsize
    if end > len(chunk) or piece.offset % dtype.itemsize:
        raise ValueError(
            f"{where} of {dtype}, size {piece.size} and offset {piece.offset} must be aligned and end in the "
            f"chunk of {len(chunk)} bytes"
        )
    return chunk[piece.offset : end].view(dtype).view(piece.size)
