"""What a server is asked to sample, as the body of a request: for our own route, or for vLLM's."""

from __future__ import annotations

import dataclasses
import uuid
from dataclasses import dataclass
from typing import Any

from megatron_dapo.rollout.wire import sequence_seed
from megatron_dapo.types import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Sequences of one prompt. numbers: which of the prompt's sequences each is. began: empty, or what each
    goes on from. seed: of number 0.
    """

    prompt: list[int]
    numbers: list[int]
    began: list[Partial]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop_token_ids: list[int]
    cache_salt: str
    request_id: str | None = None

    @property
    def goes_on(self) -> bool:
        """Whether any sequence begins with more than the prompt."""
        return any(len(partial.tokens) for partial in self.began)

    def apart(self) -> list[Asked]:
        """The same sequences in requests that have one beginning each."""
        if not self.goes_on:
            return [self]
        pairs = zip(self.numbers, self.began, strict=True)
        return [dataclasses.replace(self, numbers=[i], began=[partial]) for i, partial in pairs]

    def body(self) -> dict[str, Any]:
        """For our own route, which answers in frames."""
        body = {
            "token_ids": self.prompt,
            "n": len(self.numbers),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop_token_ids": self.stop_token_ids,
            "seed": self.seed,
            "request_id": self.request_id,
            "cache_salt": self.cache_salt,
        }
        if self.goes_on:
            body["began"] = [partial.tokens.tolist() for partial in self.began]
            body["numbers"] = self.numbers
        return body

    def json_body(self) -> dict[str, Any]:
        """For vLLM's route; the sequences must have the same beginning (`apart`) and consecutive numbers."""
        began = self.began[0].tokens.tolist() if self.began else []
        params: dict[str, Any] = {
            "n": len(self.numbers),
            "max_tokens": self.max_tokens - len(began),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
            "stop_token_ids": self.stop_token_ids,
        }
        if self.seed is not None:
            params["seed"] = sequence_seed(self.seed, self.numbers[0], len(began))
        return {
            "request_id": self.request_id or uuid.uuid4().hex,
            "token_ids": self.prompt + began,
            "sampling_params": params,
            "cache_salt": self.cache_salt,
        }
