"""Tiny random Hugging Face checkpoints with a character-level tokenizer, made on the spot."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Literal

import torch

SPECIAL = ("<|pad|>", "<|eos|>", "<|unk|>")
ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"
# What an architecture's configuration has beside the sizes. Heads have 32 dimensions everywhere.
SPECIAL_KEYS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": None, "head_dim": 32},
}
# Of the session's vLLM server (conftest.py).
MAX_MODEL_LEN = 1024
TOKEN = "token-of-the-test-session"


def make_tiny_model(
    folder: str | Path,
    *,
    tied: bool = False,
    layers: int = 2,
    arch: Literal["qwen2", "qwen3", "qwen3_moe", "llama", "mistral"] = "qwen2",
    seed: int = 0,
    hidden: int = 128,
    renormalize_experts: bool = True,
    ffn: int = 192,
    heads: int = 4,
    kv_heads: int = 2,
    max_positions: int = 512,
) -> Path:
    """Write a random fp32 checkpoint, its tokenizer and generation_config; returns the folder.

    Heads have 32 dimensions, the fewest vLLM's CPU attention knows. The weights are drawn wide enough that
    logits differ clearly between tokens and between seeds.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    tokenizer = make_tokenizer()
    experts = {"moe_intermediate_size": ffn, "norm_topk_prob": renormalize_experts}
    special = SPECIAL_KEYS.get(arch, {}) | (experts if arch == "qwen3_moe" else {})
    config = AutoConfig.for_model(
        arch,
        **special,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer():
    """One token per character of ALPHABET; ids 0, 1, 2 are padding, end of sequence and unknown.

    A byte-level BPE without merges, because transformers 5 loads whatever tokenizer stands beside a Qwen2
    model as a Qwen2Tokenizer, with byte-level pre-tokenization of its own: any other kind would come back
    changed.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = [in_bytes.pre_tokenize_str(character)[0][0] for character in ALPHABET]
    unused = [
        f"<|unused_{i}|>" for i in range(-(len(SPECIAL) + len(names)) % 8)
    ]  # so that the vocabulary splits over ranks
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *names, *unused))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = in_bytes
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>", unk_token="<|unk|>"
    )
