"""What a decoder-only model is: sizes and options read from a Hugging Face config.json, and the architectures
that are known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dapo.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What config.json does not say because the model's code does."""

    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    refused: Mapping[str, Any] = field(
        default_factory=dict
    )  # keys of config.json, each with the only value that is supported
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # what transformers takes for keys that config.json leaves out


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(refused={"attention_bias": False, "mlp_bias": False}),
    "MistralForCausalLM": Architecture(refused={"sliding_window": None}, defaults={"sliding_window": 4096}),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, refused={"use_sliding_window": False}),
    "Qwen3ForCausalLM": Architecture(
        qk_norm=True,
        refused={"attention_bias": False, "use_sliding_window": False},
        defaults={"head_dim": 128},
    ),
    "Qwen3MoeForCausalLM": Architecture(
        qk_norm=True,
        experts=True,
        refused={
            "attention_bias": False,
            "use_sliding_window": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        defaults={"norm_topk_prob": False},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes and options of a decoder-only model, read from config.json."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int  # of one expert, where there are experts
    vocab_size: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool = False
    num_experts: int = 0  # 0: dense, and so the other two
    experts_per_token: int = 0
    renormalize_experts: bool = False  # the chosen experts' probabilities sum to 1
    norm_eps: float
    rope_theta: float
    rope_factor: float | None
    max_positions: int
    eos_token_ids: tuple[int, ...]

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def dense(self) -> bool:
        return not self.num_experts

    @property
    def untied(self) -> bool:
        return not self.tied

    def shape(self, sizes: Sequence[str]) -> tuple[int, ...]:
        """The shape of a tensor from the names of its sizes, fields or properties of this class."""
        return tuple(getattr(self, size) for size in sizes)


def read_model(folder: Path) -> ModelSpec:
    """Read config.json; UserError for a missing tokenizer or a model this package cannot train, before
    anything is loaded.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"model.path={folder} has no config.json; it must be a Hugging Face checkpoint folder"
        )
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise UserError(
            f"model.path={folder} has no tokenizer (tokenizer.json); save one there with "
            f"tokenizer.save_pretrained"
        )
    config = _read_json(file)
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"model.path={folder}: architecture {architecture} is not supported; supported: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    kind = ARCHITECTURES[architecture]
    config = {**kind.defaults, **config}
    for key, value in {"hidden_act": "silu", **kind.refused}.items():
        if config.get(key) not in (None, value):
            raise UserError(
                f"model.path={folder}: {key}={json.dumps(config[key])} is not supported for {architecture}, "
                f"only {json.dumps(value)}"
            )
    if kinds := set(config.get("layer_types") or []) - {"full_attention"}:
        raise UserError(
            f"model.path={folder}: layer_types {sorted(kinds)} are not supported, only full_attention"
        )
    if kind.experts and config.get("num_experts_per_tok") == 1 and config.get("norm_topk_prob"):
        raise UserError(
            f"model.path={folder}: num_experts_per_tok=1 with norm_topk_prob=true is not supported: the "
            f"weight of the one expert is "
            "always 1, so its router would not be trained"
        )
    generation = folder / "generation_config.json"
    eos = (_read_json(generation) if generation.is_file() else {}).get(
        "eos_token_id", config.get("eos_token_id")
    )
    try:
        return _spec(architecture, config, folder, eos)
    except KeyError as error:
        raise UserError(
            f"model.path={folder}: config.json has no {error}, which {architecture} needs; fetch the "
            f"checkpoint again"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"model.path={file.parent}: {file.name} is not JSON ({error}); fetch the checkpoint again"
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"model.path={file.parent}: {file.name} holds a {type(values).__name__}, not an object; fetch "
            f"the checkpoint again"
        )
    return values


def _spec(architecture: str, config: Mapping[str, Any], folder: Path, eos: Any) -> ModelSpec:
    """`config`: config.json with the architecture's defaults. `eos`: a token id, a list of them or None."""
    kind, heads = ARCHITECTURES[architecture], config["num_attention_heads"]
    theta, factor = _rope(config, folder)
    return ModelSpec(
        architecture=architecture,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        ffn_size=config["moe_intermediate_size" if kind.experts else "intermediate_size"],
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind.qkv_bias,
        qk_norm=kind.qk_norm,
        num_experts=(config.get("num_experts") or config["num_local_experts"]) if kind.experts else 0,
        experts_per_token=config["num_experts_per_tok"] if kind.experts else 0,
        renormalize_experts=kind.experts and config["norm_topk_prob"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=theta,
        rope_factor=factor,
        max_positions=config["max_position_embeddings"],
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def _rope(config: Mapping[str, Any], folder: Path) -> tuple[float, float | None]:
    """Base and, for Llama 3's scaling, factor. Both spellings of config.json (before and since transformers
    5) are read.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    fixed = (
        rope.get("low_freq_factor"),
        rope.get("high_freq_factor"),
        rope.get("original_max_position_embeddings"),
    )
    if kind == "llama3" and fixed == (1.0, 4.0, 8192):
        return theta, float(rope["factor"])
    raise UserError(
        f"model.path={folder}: rope scaling {rope} is not supported; supported: none, and llama3 with "
        f"factors 1, 4, 8192"
    )
