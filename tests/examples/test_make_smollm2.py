"""GGUF to Hugging Face: names, the rotary permutation by hand and against the rotation itself, the
tokenizer's digits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import make_smollm2 as smollm2


def test_rope_permutation_by_hand():
    # Two heads of four rows. llama.cpp stores each head as rows 0, 2, 1, 3 of the original: (0, 0 + 4/2), (1,
    # 1 + 4/2).
    original = np.arange(8).repeat(3).reshape(8, 3)
    stored = original[[0, 2, 1, 3, 4, 6, 5, 7]]
    assert (smollm2.undo_rope_permutation(stored, num_heads=2) == original).all()


def test_rope_permutation_makes_both_rotations_agree():
    """Rotating neighbours (llama.cpp) of the stored rows is rotating halves (Hugging Face) of ours, up to the
    order of rows.
    """
    rng = np.random.default_rng(0)
    stored, angles = rng.normal(size=(8, 1)), rng.normal(size=4)
    cos, sin = np.cos(angles), np.sin(angles)
    even, odd = stored[0::2, 0], stored[1::2, 0]
    neighbours = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=1).reshape(8, 1)
    first, second = np.split(smollm2.undo_rope_permutation(stored, num_heads=1)[:, 0], 2)
    halves = np.concatenate([first * cos - second * sin, second * cos + first * sin])
    np.testing.assert_allclose(smollm2.undo_rope_permutation(neighbours, num_heads=1)[:, 0], halves)


def test_names():
    assert smollm2.hf_name("blk.29.attn_q.weight") == "model.layers.29.self_attn.q_proj.weight"
    assert smollm2.hf_name("token_embd.weight") == "model.embed_tokens.weight"
    assert smollm2.hf_name("output_norm.weight") == "model.norm.weight"
    for unknown in ("blk.0.attn_q.bias", "blk.0.ssm.weight", "rope_freqs.weight"):
        with pytest.raises(ValueError, match="add a row"):
            smollm2.hf_name(unknown)


def test_tokenizer_splits_digits_and_keeps_special_tokens_whole():
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"12a:", "Ġ", "Ċ", "12", "aa"]
    meta = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["1 2", "a a"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        "llama.context_length": 64,
    }
    tokenizer = smollm2.make_tokenizer(meta)
    assert tokenizer.tokenize("<|im_start|>aa: 12\n<|im_end|>") == [
        "<|im_start|>",
        "aa",
        ":",
        "Ġ",
        "1",
        "2",
        "Ċ",
        "<|im_end|>",
    ]
    assert tokenizer.decode(tokenizer("aa: 12\n")["input_ids"]) == "aa: 12\n"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    with pytest.raises(ValueError, match="smollm"):
        smollm2.make_tokenizer({**meta, "tokenizer.ggml.pre": "llama3"})
