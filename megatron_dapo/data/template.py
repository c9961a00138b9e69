"""How a problem, and an answer to it, are written for the model: data.template, data.chat and data.few_shot.

template = Template(config.data, tokenizer)
text, tokens = template.prompt("1+1=")
template.response("1+1=", "2")       # tokens that follow these, with the one that ends a response
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_dapo.config import DataConfig
from megatron_dapo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Template:
    """UserError for chat messages without a chat template, and for worked examples that are none."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer: Any = tokenizer  # its types leave open what a call returns
        self._shots = _few_shot_messages(config)
        if config.chat and not tokenizer.chat_template:
            raise UserError(
                f"data.chat=true but the tokenizer {tokenizer.name_or_path!r} has no chat template; "
                "use an instruct model's tokenizer or set data.chat=false with a data.template"
            )

    def prompt(self, problem: str) -> tuple[str, tuple[int, ...]]:
        """Text and tokens of a problem."""
        text = self._text(problem)
        # A chat template writes its special tokens itself; plain text gets what the tokenizer adds by
        # default.
        encoded = self._tokenizer(text, add_special_tokens=not self._config.chat, verbose=False)
        return text, tuple(encoded["input_ids"])

    def response(self, problem: str, response: str) -> tuple[int, ...]:
        """Tokens of a response as the model samples them behind the problem's: they end with the special
        token that the chat template puts there, or else with the tokenizer's end of sequence.

        UserError when the chat template writes a prompt differently once it is answered.
        """
        text = response
        if self._config.chat:
            before, whole = self._text(problem), self._text(problem, response)
            if not whole.startswith(before):
                raise UserError(
                    f"the chat template of the tokenizer {self._tokenizer.name_or_path!r} writes a prompt "
                    "differently when an answer follows it, so the answer's tokens cannot be told apart; set "
                    "data.chat=false with a data.template"
                )
            text = whole[len(before) :].rstrip()  # a model stops before the line's end that follows
        tokens = tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokens and tokens[-1] in self._tokenizer.all_special_ids:
            return tokens
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {self._tokenizer.name_or_path!r} has no end-of-sequence token, which ends a "
                "response; set eos_token in its tokenizer_config.json"
            )
        return (*tokens, self._tokenizer.eos_token_id)

    def _text(self, problem: str, response: str | None = None) -> str:
        text = self._config.template.replace("{prompt}", problem)
        if not self._config.chat:
            return text
        messages = [*self._shots, {"role": "user", "content": text}]
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return str(
            self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=response is None, tokenize=False
            )
        )


def _few_shot_messages(config: DataConfig) -> list[dict[str, str]]:
    messages = []
    for number, shot in enumerate(config.few_shot):
        if set(shot) != {"prompt", "response"}:
            raise UserError(
                f"data.few_shot[{number}] has the keys {sorted(shot)}; it needs exactly 'prompt' and "
                f"'response'"
            )
        messages.append({"role": "user", "content": config.template.replace("{prompt}", shot["prompt"])})
        messages.append({"role": "assistant", "content": shot["response"]})
    return messages
