"""The receiving end of a weight push, inside each vLLM worker.

Chunks of Hugging Face tensors arrive in memory shared with the trainer (sync/shm.py), each described by a
Manifest. vLLM's own loader takes what its shard needs from each, inside vLLM's layerwise reload, so it also
works where vLLM repacks weights (CPU kernels, FP8).
"""

from __future__ import annotations

import mmap
import os
import warnings
from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from megatron_dapo.environment import DIGEST_VARIABLE
from megatron_dapo.sync.manifest import Manifest
from megatron_dapo.sync.vllm import reload
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
    """start -> receive chunk after chunk -> finish. After an error, start again and send all chunks."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False
    _digests: UpdateDigests | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def parse_update_info(self, update_dict: dict[str, Any]) -> UpdateInfo:
        """ValueError names a field of the manifest that makes no sense."""
        return UpdateInfo(Manifest.from_json(update_dict))

    def start_weight_update(self) -> None:
        """Begin an update; one that was begun and not finished is given up."""
        self._drop_digests()
        reload.abandon_update(self.model)
        self._received: set[str] = set()
        self._version: int | None = None
        if os.environ.get(DIGEST_VARIABLE):
            self._digests = UpdateDigests(self.model)
        initialize_layerwise_reload(self.model)
        if current_platform.is_cpu():
            reload.forget_packed_experts(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load one chunk; afterwards nothing refers to its memory, which the trainer fills anew.

        ValueError for a tensor sent twice, a version that changes within an update, or a name the model does
        not know.
        """
        manifest = update_info.manifest
        if self._version not in (None, manifest.version):
            raise ValueError(f"weight update {self._version} received a chunk of version {manifest.version}")
        names = [entry.name for entry in manifest.entries]
        if repeated := sorted(self._received.intersection(names)):
            raise ValueError(
                f"weight update {manifest.version} received tensors twice: {repeated[:NAMES_IN_ERRORS]}"
            )
        self._version = manifest.version
        self._received.update(names)
        with open(manifest.path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            tensors = manifest.views(memory)
        model: Any = self.model
        model.load_weights(iter(tensors.items()))
        reload.copy_waiting_tensors(self.model, memory)

    def finish_weight_update(self) -> None:
        """Put the update into use.

        RuntimeError names what is missing; more chunks may follow then, and another finish.
        """
        tied = reload.tied_layers(self.model)
        if missing := reload.missing_parameters(self.model, tied):
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
        pass

    def _drop_digests(self) -> UpdateDigests | None:
        """Stop watching the layers of this update."""
        digests, self._digests = self._digests, None
        if digests:
            digests.detach()
        return digests
