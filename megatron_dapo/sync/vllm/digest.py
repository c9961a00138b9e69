"""SHA-256 of every parameter of a vLLM worker as loaded, before vLLM repacks it (on CPU the repacked weight
is an empty tensor).

Written as JSON {parameter name: hex digest} to `$MEGATRON_DAPO_DIGEST_DIR/tp{rank}-load.json` when a server
loads its checkpoint, and to `tp{rank}-v{version}.json` after each weight update. Two servers hold the same
weights if these are equal (sync/verify.py compares them).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.config.utils import replace
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from megatron_dapo.environment import DIGEST_VARIABLE, PLUGIN


class DigestLoader(DefaultModelLoader):
    """vLLM's default loader (`--load-format megatron_dapo`) that also writes digests of what it loaded."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="auto"))

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        super().load_weights(model, model_config)
        write_digests({name: sha256(parameter) for name, parameter in model.named_parameters()}, "load")


def register_loader() -> None:
    register_model_loader(PLUGIN)(DigestLoader)


class UpdateDigests:
    """Digests of one weight update, each taken when its layer is complete and about to be repacked; those of
    layers that are never repacked at the end.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._names = {layer: name for name, layer in model.named_modules()}
        self._taken: dict[str, str] = {}
        methods = {
            id(layer.quant_method): layer.quant_method
            for layer in self._names
            if hasattr(layer, "quant_method")
        }
        self._methods = [method for method in methods.values() if method is not None]
        for method in self._methods:
            # On the instance: gone with detach(), and invisible to other models.
            vars(method)["process_weights_after_loading"] = functools.partial(self._take_first, method)

    def _take_first(self, method: Any, layer: torch.nn.Module) -> Any:
        for name, parameter in layer.named_parameters(recurse=False):
            self._taken[f"{self._names[layer]}.{name}"] = sha256(parameter)
        return type(method).process_weights_after_loading(method, layer)

    def detach(self) -> None:
        for method in self._methods:
            vars(method).pop("process_weights_after_loading", None)

    def write(self, version: int) -> None:
        """After the update is finalized. The names are those of a fresh load: tied parameters once."""
        digests = {
            name: self._taken.get(name) or sha256(parameter)
            for name, parameter in self._model.named_parameters()
        }
        write_digests(digests, f"v{version}")


def sha256(tensor: torch.Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def write_digests(digests: dict[str, str], label: str) -> None:
    """Whole or not at all: readers see the file only when it is complete."""
    path = Path(os.environ[DIGEST_VARIABLE]) / f"tp{get_tensor_model_parallel_rank()}-{label}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(digests, indent=0, sort_keys=True))
    temporary.replace(path)
