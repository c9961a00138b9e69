"""Token ids to text in the grading processes, equal to what the run's own tokenizer decodes.

A worker must start quickly, because every time-out restarts one: wherever the Rust part of the tokenizer
decodes by itself, it loads that part alone (`tokenizers`, no transformers, no torch).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_dapo.errors import UserError

Decode = Callable[[bytes], str]  # int32 token ids, in the byte order of the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSource:
    """What a worker loads its tokenizer from: the JSON of a `tokenizers.Tokenizer`, or the folder (or hub
    name) that transformers loads it from.
    """

    library: Literal["tokenizers", "transformers"]
    body: bytes


def decoder_source(tokenizer: Any) -> DecoderSource:
    """The lightest source that decodes as `tokenizer`, a loaded transformers tokenizer, does.

    The loaded object is written down, not the folder's tokenizer.json: transformers changes what it read
    there by tokenizer_config.json (added tokens) and by the model's class.
    """
    if _backend_decodes_alone(tokenizer):
        try:
            return DecoderSource(library="tokenizers", body=tokenizer.backend_tokenizer.to_str().encode())
        except Exception:  # tokenizers raises this very class for parts that are written in Python
            pass
    return DecoderSource(library="transformers", body=os.fsencode(tokenizer.name_or_path))


def _backend_decodes_alone(tokenizer: Any) -> bool:
    """Whether `tokenizer.decode` is nothing but its backend's decode, as in transformers 5."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    kind = type(tokenizer)
    if (
        kind._decode is not PreTrainedTokenizerFast._decode
        or kind.decode is not PreTrainedTokenizerBase.decode
    ):
        return False
    if not tokenizer.clean_up_tokenization_spaces:
        return True
    # "a , b" becomes "a, b" in Python, but for BPE only where the configuration insists.
    forced = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return type(tokenizer.backend_tokenizer.model).__name__ == "BPE" and not forced


def load_decoder(library: str, body: bytes) -> Decode:
    """The function from int32 ids to text without special tokens; in the worker. UserError if there is
    none.
    """
    try:
        tokenizer = _load(library, body)
    except Exception as error:
        where = f" {os.fsdecode(body)}" if library == "transformers" else ""
        raise UserError(
            f"the tokenizer{where} cannot be loaded by a grading process with {library}: {error!r}; "
            "save it into the model's folder with a transformers that this environment's can read"
        ) from error

    def decode(tokens: bytes) -> str:
        ids = array("i")
        ids.frombytes(tokens)
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    return decode


def _load(library: str, body: bytes) -> Any:
    if library == "tokenizers":
        from tokenizers import Tokenizer

        return Tokenizer.from_str(body.decode())
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.fsdecode(body))
