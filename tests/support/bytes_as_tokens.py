"""A tokenizer whose token b is the byte b, so that any text, and any broken text, is a sequence of tokens."""

from __future__ import annotations

import numpy as np

END = 256  # its one special token
# How byte-level tokenizers spell a byte: a printable one as itself, the others from U+0100 on (GPT-2's rule).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
SPELLING = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}


def make_byte_backend():
    """A `tokenizers.Tokenizer` of 257 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({SPELLING[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


def as_tokens(text: str | bytes) -> np.ndarray:
    """The text's bytes as int32 token ids, with the end token behind them."""
    data = text.encode() if isinstance(text, str) else text
    return np.array([*data, END], dtype=np.int32)
