#!/usr/bin/env python3
"""Download a data set from the Hugging Face hub into JSONL {prompt, answer}.

    python tools/download_data.py --name BytedTsinghua-SIA/DAPO-Math-17k --split train \\
        --prompt-path prompt.0.content --answer-path reward_model.ground_truth --dedup --out
        data/dapo-math-17k.jsonl

A path walks through a row: names enter objects, numbers enter lists. The prompts of BytedTsinghua-SIA carry
their instruction around the problem; --template says which, it is taken off, and the run's data.template adds
it again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_dapo.data.rows import load_rows

# Around every problem of BytedTsinghua-SIA/DAPO-Math-17k and AIME-2024; data.template of
# examples/configs/qwen32b.yaml.
DAPO_TEMPLATE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    "{prompt}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def pick(row: Any, path: str) -> Any:
    """`pick({"prompt": [{"content": "1+1"}]}, "prompt.0.content") == "1+1"`. ValueError says where the path
    ends.
    """
    value = row
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            held = list(value) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise ValueError(
                f"path {path!r} has no {part!r} in {held}; change --prompt-path or --answer-path"
            ) from error
    return value


def bare(prompt: Any, template: str) -> Any:
    """The problem alone, where the prompt is the template around it; else the prompt as it is."""
    before, _, after = (part.strip() for part in template.partition("{prompt}"))
    if not isinstance(prompt, str):
        return prompt
    text = prompt.strip()
    problem = text.removeprefix(before).removesuffix(after).strip()
    return problem if problem and text.startswith(before) and text.endswith(after) else prompt


def map_rows(
    rows: Iterable[Mapping[str, Any]],
    prompt_path: str,
    answer_path: str,
    dedup: bool,
    template: str = DAPO_TEMPLATE,
) -> Iterator[dict[str, Any]]:
    """{prompt, answer} of every row, the prompt without the template; with `dedup` the first row of every
    prompt.
    """
    seen: set[str] = set()
    for row in rows:
        prompt = bare(pick(row, prompt_path), template)
        if dedup and isinstance(prompt, str):
            if prompt in seen:
                continue
            seen.add(prompt)
        yield {"prompt": prompt, "answer": pick(row, answer_path)}


def write(
    rows: Iterable[Mapping[str, Any]],
    prompt_path: str,
    answer_path: str,
    dedup: bool,
    out: Path,
    template: str = DAPO_TEMPLATE,
) -> int:
    """Check the rows as a run would, then write them atomically; returns how many."""
    mapped = list(map_rows(rows, prompt_path, answer_path, dedup, template))
    checked = load_rows(mapped, "prompt", "answer", field="--name")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for row in checked:
            file.write(json.dumps({"prompt": row.prompt, "answer": row.answer}, ensure_ascii=False) + "\n")
    os.replace(unfinished, out)
    return len(checked)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="data set on the hub, owner/name")
    parser.add_argument("--subset", help="configuration of the data set, where it has several")
    parser.add_argument("--split", default="train")
    parser.add_argument("--prompt-path", default="prompt", help="where a row holds the problem's text")
    parser.add_argument("--answer-path", default="answer", help="where a row holds the final answer")
    parser.add_argument(
        "--template",
        default=DAPO_TEMPLATE,
        help="text around {prompt} that is taken off each prompt that has it (default: DAPO's instruction; "
        "'{prompt}': none)",
    )
    parser.add_argument("--dedup", action="store_true", help="keep the first row of every prompt")
    parser.add_argument("--out", required=True, type=Path, help="JSONL file to write")
    args = parser.parse_args()
    if args.out.suffix != ".jsonl":
        parser.error(f"--out {args.out} must end in .jsonl")
    if "{prompt}" not in args.template:
        parser.error(f"--template {args.template!r} must hold {{prompt}}, where the problem is")

    import datasets

    rows = datasets.load_dataset(args.name, args.subset, split=args.split)
    try:
        num_rows = write(rows, args.prompt_path, args.answer_path, args.dedup, args.out, args.template)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.out}: {num_rows} of {len(rows)} rows")


if __name__ == "__main__":
    main()
