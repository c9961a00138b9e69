#!/usr/bin/env python3
"""Make a 3-million-parameter base model that can almost add and subtract, with its problems, in about two
minutes on a laptop.

    python examples/make_tiny_base.py --out .cache/tiny_base

The folder holds a Qwen2 checkpoint (fp32 safetensors, tokenizer, generation_config), train.jsonl and
eval.jsonl.

How it becomes a base for reinforcement learning, said plainly: no pre-trained weights are involved. A random
model is trained on worked solutions of two-digit sums and differences until it can do them,

    What is 37+48?
    7+8=15,3+4+1=8
    Answer: 85

and then for a few dozen steps on solutions of which MOST ARE WRONG ON PURPOSE: a digit slips, a carry or
borrow is forgotten or invented, or the answer is copied down wrong. So the model knows the right procedure
and, sampled at temperature 1, makes such a mistake more often than not. RL has to find out from the verifier
alone which variants are the mistakes; it does so quickly because the right procedure is already there. That
makes this a fast check that an RL implementation works, not evidence of what RL does for a real language
model. The warm-up, the RL problems (train.jsonl) and the evaluation (eval.jsonl) share no problem.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from made_folder import make_folder, write_jsonl
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

VERSION = 1  # raise it when the folder's content changes, so that old caches are rebuilt
EOS, PAD = "<|im_end|>", "<|endoftext|>"
NEWLINE, SPACE = "Ċ", "Ġ"  # how byte-level tokenizers write them
WORDS = ("What", SPACE + "is", "Answer")  # one token each; every other token is one character
NUM_EVAL, NUM_TRAIN = 256, 4096
DECAY_STEPS = 600  # over which the learning rate falls to a fifth
KNOWS = 0.95  # sampled accuracy at which the first lesson ends
FLAW_RATE = 0.65  # share of wrong solutions in the second lesson
FLAWS = ("slip", "carry", "copy")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"

Problem = tuple[int, str, int]  # left, "+" or "-", right


# --- problems ---------------------------------------------------------------------------


def all_problems() -> list[Problem]:
    """Every sum of two two-digit numbers and every difference that is not negative: 12,195 problems."""
    numbers = range(10, 100)
    return [(a, sign, b) for a in numbers for b in numbers for sign in "+-" if sign == "+" or a >= b]


def split_problems(seed: int) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """(warm-up, RL train, evaluation), disjoint."""
    problems = all_problems()
    random.Random(f"split/{seed}").shuffle(problems)
    return problems[NUM_EVAL + NUM_TRAIN :], problems[NUM_EVAL : NUM_EVAL + NUM_TRAIN], problems[:NUM_EVAL]


def question(problem: Problem) -> str:
    a, sign, b = problem
    return f"What is {a}{sign}{b}?\n"


def answer(problem: Problem) -> int:
    a, sign, b = problem
    return a + b if sign == "+" else a - b


def solve(problem: Problem, flaw: str | None = None, rng: random.Random | None = None) -> str:
    """The worked solution, digit by digit; `flaw` (one of FLAWS, needs `rng`) makes it end in a wrong
    answer.
    """
    a, sign, b = problem
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    if sign == "+":
        ones = a_ones + b_ones
        carry = ones >= 10
        first, step, slips = f"{a_ones}+{b_ones}=", 1, range(19)
    else:
        carry = a_ones < b_ones
        ones = a_ones + 10 * carry - b_ones
        first, step, slips = f"{a_ones + 10 * carry}-{b_ones}=", -1, range(10)
    if flaw == "slip":
        ones = rng.choice([n for n in (ones - 2, ones - 1, ones + 1, ones + 2) if n in slips])
        carry = ones >= 10 if sign == "+" else carry
    if flaw == "carry":
        carry = not carry
    tens = (a_tens + b_tens if sign == "+" else a_tens - b_tens) + step * carry
    second = f"{a_tens}{sign}{b_tens}{sign}1=" if carry else f"{a_tens}{sign}{b_tens}="
    result = str(10 * tens + ones % 10) if tens >= 0 else f"-{-tens}{ones % 10}"
    if flaw == "copy":
        place = rng.randrange(len(result))
        digits = [d for d in "0123456789" if d != result[place] and (place > 0 or d != "0")]
        result = result[:place] + rng.choice(digits) + result[place + 1 :]
    return f"{first}{ones},{second}{tens}\nAnswer: {result}"


def warm_up_text(problem: Problem, flaw_rate: float, rng: random.Random) -> str:
    """A solution as the base model sees them: wrong with probability `flaw_rate`."""
    return solve(problem, rng.choice(FLAWS) if rng.random() < flaw_rate else None, rng)


def rows(problems: list[Problem]) -> list[dict[str, str]]:
    return [{"prompt": question(problem), "answer": str(answer(problem))} for problem in problems]


# --- model ------------------------------------------------------------------------------


def make_tokenizer() -> Qwen2Tokenizer:
    """One token per printable ASCII character, newline or word of WORDS; an even number of tokens, so that
    they split over ranks.

    It is Qwen2's own class because loaders pick that for a Qwen2 checkpoint and would silently rebuild any
    other as one.
    """
    vocab = [PAD, EOS, NEWLINE, SPACE, *(chr(code) for code in range(33, 127))]
    merges = []
    for word in WORDS:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            vocab.append(word[: end + 1])
    vocab += [f"<|unused_{i}|>" for i in range(-len(vocab) % 8)]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=merges,
        unk_token=PAD,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


@torch.no_grad()
def sampled_accuracy(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, problems: list[Problem]) -> float:
    """Share of problems whose one sampled response (temperature 1) ends in the right answer."""
    model.eval()
    inputs = tokenizer(
        [question(p) for p in problems], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    output = model.generate(**inputs, max_new_tokens=32, do_sample=True)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    return sum(text.endswith(f"Answer: {answer(p)}") for text, p in zip(texts, problems, strict=True)) / len(
        problems
    )


# --- warm-up ----------------------------------------------------------------------------


def make_batch(
    tokenizer: Qwen2Tokenizer, problems: list[Problem], flaw_rate: float, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and label rows of equal length; labels cover the response only."""
    prompts = tokenizer([question(p) for p in problems])["input_ids"]
    responses = tokenizer([warm_up_text(p, flaw_rate, rng) + EOS for p in problems])["input_ids"]
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    tokens = torch.full((len(problems), longest), tokenizer.pad_token_id)
    labels = torch.full((len(problems), longest), -100)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        tokens[i, : len(p) + len(r)] = torch.tensor(p + r)
        labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
    return tokens, labels


def warm_up(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, args: argparse.Namespace) -> None:
    """First right solutions until sampled accuracy reaches KNOWS, then flawed ones too until it falls to
    `args.target`.

    Accuracy is measured on problems that the warm-up does not train on. AdamW, cross-entropy on the response.
    """
    problems, probe, _ = split_problems(args.seed)
    rng = random.Random(f"warm-up/{args.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    started, accuracy, flaw_rate, check_every = time.monotonic(), 0.0, 0.0, 50
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(step / 50, max(0.2, 1 - step / DECAY_STEPS))
        tokens, labels = make_batch(tokenizer, rng.choices(problems, k=args.batch), flaw_rate, rng)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % check_every:
            continue
        accuracy = sampled_accuracy(model, tokenizer, probe[:NUM_EVAL])
        lesson, seconds = "with flaws" if flaw_rate else "right", time.monotonic() - started
        say(f"step {step} ({lesson}): loss {loss.item():.3f}, accuracy {accuracy:.2f}, {seconds:.0f} s")
        if flaw_rate and accuracy <= args.target:
            return
        if accuracy >= KNOWS:
            flaw_rate, check_every = FLAW_RATE, 5
    say(
        f"accuracy {accuracy:.2f} after all --steps {args.steps}, wanted {KNOWS} and then {args.target}; "
        f"raise --steps"
    )


def build(folder: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    say(f"{model.num_parameters() / 1e6:.1f}M parameters, {torch.get_num_threads()} threads")
    warm_up(model, tokenizer, args)
    _, train, held_out = split_problems(args.seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_jsonl(folder / "train.jsonl", rows(train))
    write_jsonl(folder / "eval.jsonl", rows(held_out))
    say(f"held-out accuracy at temperature 1: {sampled_accuracy(model, tokenizer, held_out):.2f}")


def say(text: str) -> None:
    print(f"[tiny base] {text}", file=sys.stderr, flush=True)


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="most warm-up steps")
    parser.add_argument("--batch", type=int, default=32, help="solutions per warm-up step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="warm-up learning rate")
    parser.add_argument(
        "--target", type=float, default=0.45, help="sampled accuracy at which the warm-up stops"
    )
    args = parser.parse_args()
    arguments = {
        "script": "make_tiny_base",
        "version": VERSION,
        **{k: v for k, v in vars(args).items() if k != "out"},
    }
    try:
        make_folder(args.out, arguments, lambda folder: build(folder, args))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
