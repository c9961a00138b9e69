"""What Megatron does to FP8 parameters, of which there are none here."""

from __future__ import annotations

from typing import Any


def replace_raw_data(tensor: Any, new_raw_data: Any) -> None:
    raise NotImplementedError("FP8 parameters")


def cast_master_weights_to_fp8(
    model_weights: Any,
    master_weights: Any,
    start_offsets: Any,
    group: Any,
    fsdp_shard_model_weights: Any = None,
) -> None:
    raise NotImplementedError("FP8 parameters")
