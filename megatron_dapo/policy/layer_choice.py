"""Whose layers a policy on a GPU has (`policy.layers`). On a CPU they are Megatron's local ones always."""

from __future__ import annotations

import importlib.util

from megatron_dapo.config import PolicyConfig


def has_transformer_engine() -> bool:
    """Whether it is installed; it is not imported."""
    return importlib.util.find_spec("transformer_engine") is not None


def uses_transformer_engine(policy: PolicyConfig) -> bool:
    """Whether layers on a GPU are TransformerEngine's."""
    return policy.layers == "te" or (policy.layers == "auto" and has_transformer_engine())
