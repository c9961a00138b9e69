"""The text that a grading process makes of tokens is the text that the run's own tokenizer makes of them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.bytes_as_tokens import END, make_byte_backend
from support.models import make_tiny_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from megatron_dapo.errors import UserError
from megatron_dapo.reward.decoding import decoder_source, load_decoder

WORDS = ["the", "a", "ball", "##s", "##es", ".", ",", "!", "?", "'", "s", "m", "n't", "'s", "do"]


def saved(folder: Path, tokenizer) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def fast(folder: Path, backend: Tokenizer, **options) -> Path:
    return saved(folder, PreTrainedTokenizerFast(tokenizer_object=backend, **options))


def with_all_bytes(folder: Path, **options) -> Path:
    return fast(folder, make_byte_backend(), eos_token="<|end|>", **options)


def with_byte_fallback(folder: Path) -> Path:
    """As Llama 2's: pieces with a mark for spaces, bytes as tokens of their own, one space stripped."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁is", "é", "日"]
    backend = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(folder, backend, eos_token="</s>", unk_token="<unk>")


def of_word_pieces(folder: Path, **options) -> Path:
    """As BERT's: its decoder puts a space before punctuation and a clean-up may take it away."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return fast(folder, backend, unk_token="[UNK]", sep_token="[SEP]", **options)


def with_a_token_of_the_configuration(folder: Path) -> Path:
    """A token that tokenizer.json does not know; the configuration beside it adds it."""
    fast(folder, make_byte_backend(), eos_token="<|end|>")
    path = folder / "tokenizer_config.json"
    added = {"content": "<tool>", "special": False, "lstrip": False, "rstrip": False}
    added |= {"normalized": False, "single_word": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": {"257": added}}))
    return folder


def with_merges_beside_a_qwen2_model(folder: Path) -> Path:
    """transformers then builds a Qwen2Tokenizer around the vocabulary, not the tokenizer of the file."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text()], trainer)
    make_tiny_model(folder)
    return fast(folder, backend, eos_token="<|endoftext|>")


# by name: what makes the folder, and which library a worker loads it with
TOKENIZERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "tiny": (lambda folder: saved(folder, make_tokenizer()), "tokenizers"),
    "tiny beside a Qwen2 model": (make_tiny_model, "tokenizers"),
    "merges beside a Qwen2 model": (with_merges_beside_a_qwen2_model, "tokenizers"),
    "all bytes": (with_all_bytes, "tokenizers"),
    "clean-up that BPE ignores": (
        lambda folder: with_all_bytes(folder, clean_up_tokenization_spaces=True),
        "tokenizers",
    ),
    "clean-up that is insisted on": (
        lambda folder: with_all_bytes(
            folder,
            clean_up_tokenization_spaces=True,
            clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
        ),
        "transformers",
    ),
    "byte fallback": (with_byte_fallback, "tokenizers"),
    "word pieces": (lambda folder: of_word_pieces(folder, clean_up_tokenization_spaces=False), "tokenizers"),
    "word pieces cleaned up": (
        lambda folder: of_word_pieces(folder, clean_up_tokenization_spaces=True),
        "transformers",
    ),
    "a token of the configuration": (with_a_token_of_the_configuration, "tokenizers"),
    "without a tokenizer.json": (lambda folder: saved(folder, ByT5Tokenizer()), "transformers"),
}


def in_bytes(tokens: list[int]) -> bytes:
    return np.array(tokens, dtype=np.int32).tobytes()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_is_what_the_runs_tokenizer_makes_of_the_tokens(name, tmp_path):
    make, library = TOKENIZERS[name]
    reference = AutoTokenizer.from_pretrained(make(tmp_path / "model"))
    source = decoder_source(reference)
    assert source.library == library
    decode = load_decoder(source.library, source.body)
    draw = random.Random(0)
    # 8 more than there are: an engine's vocabulary is padded, and it may sample the padding
    vocabulary = len(reference) + (8 if library == "tokenizers" else 0)
    sequences = [[draw.randrange(vocabulary) for _ in range(draw.randrange(60))] for _ in range(200)]
    expected = reference.batch_decode(sequences, skip_special_tokens=True)
    assert [decode(in_bytes(tokens)) for tokens in sequences] == expected
    assert len(set(expected)) > 100
    assert any(text != reference.decode(ids) for text, ids in zip(expected, sequences, strict=True))


def test_broken_utf8_and_nothing_at_all_are_text_too():
    source = make_byte_backend().to_str().encode()
    decode = load_decoder("tokenizers", source)
    surrogate = list("\ud800".encode(errors="surrogatepass"))
    assert decode(in_bytes([])) == decode(in_bytes([END, END])) == ""
    assert decode(in_bytes([0x41, 0xFF, 0x42])) == "A\N{REPLACEMENT CHARACTER}B"
    assert decode(in_bytes(surrogate)) == "\N{REPLACEMENT CHARACTER}" * 3
    assert decode(in_bytes([*"½\0日".encode()])) == "½\0日"


def test_a_tokenizer_that_is_gone_is_reported():
    with pytest.raises(UserError, match="tokenizer /no/such/folder cannot be loaded by a grading process"):
        load_decoder("transformers", b"/no/such/folder")
    with pytest.raises(
        UserError, match="the tokenizer cannot be loaded by a grading process with tokenizers"
    ):
        load_decoder("tokenizers", b"{}")


def test_loading_the_rust_tokenizer_imports_nothing_heavy():
    code = """
import sys
from support.bytes_as_tokens import make_byte_backend
before = set(sys.modules)
from megatron_dapo.reward.decoding import load_decoder
load_decoder("tokenizers", make_byte_backend().to_str().encode())
print(sorted({"torch", "transformers", "numpy", "asyncio"} & (set(sys.modules) - before)))
"""
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout == "[]\n", result.stderr
