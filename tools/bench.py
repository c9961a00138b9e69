#!/usr/bin/env python
"""Benchmarks that print JSON.

    python tools/bench.py step [--steps 8] [--max-age 1 | --lengths geometric] [section.key=value ...]
    python tools/bench.py rollout [--only wire | scale] [--prompts 32] [--samples 16] [--tokens 1024] ...
    python tools/bench.py packing --lengths lengths.json [--budget 22528] [--ranks 128] [--tp 8] [--cp 2]
                                  [--fp8 blockwise]
    python tools/bench.py train-step --model FOLDER --lengths lengths.json [--tokens 16384] [--budget 4096]
                                     [section.key=value ...]
    python tools/bench.py logprob [--tokens 4096] [--vocab 151936] [--hidden 1024] [--repeats 3]
    python tools/bench.py weight-sync --config qwen2.5-1.5b-like | --model FOLDER [--trainer tp2,pp2]
                                      [--engine tp2] [--pushes 5] [--dtype bf16]
                                      [--baseline full-gather | shm-whole | safetensors-reload]...
                                      [--delta]
                                      [section.key=value ...]
    python tools/bench.py delta --model FOLDER --texts prompts.jsonl [--warmup 12] [--updates 4]
                                [--tokens 512] [--message-bytes 16777216] [section.key=value ...]
    python tools/bench.py checkpoint --model FOLDER [--saves 5] [--folder DIR] [section.key=value ...]
    python tools/bench.py convert [--gigabytes 1] [--workers 1] [--repeats 3] [--folder DIR]
    python tools/bench.py grade [--groups 500] [--repeats 5]

`step`: whole training steps (collect, grade, update, sync) of a 3M-parameter model with random weights: 32
prompts x 8 samples of 20 tokens, 2 data-parallel ranks, one vLLM server, strict (sampling.max_age=0). Seconds
are medians over the steps after the first two.

`step --max-age 1`: the same steps strict and aged, one run after the other on the same machine: both medians,
and aged_over_strict of time/step. An aged run samples while it trains, so its time/rollout is what is left of
collecting.

`step --lengths geometric`: the same model with 160 tokens of vocabulary, of which one ends the response: each
token is the last with a chance of about 1/170, up to 512; two vLLM servers. `padded` is a step without
continuous batching and without packing, of the same engines and policy on responses of the same lengths:
generation in fixed batches of rollout.max_concurrency sequences an engine in which every sequence goes on to
the end of the longest (as with padded tensors), then an update on the run's ranks in micro-batches of
batch.max_tokens tokens, samples in their order, padded to the longest of each; the push of weights is the
run's own. padded_over_step compares the two; update_alone is the packed update where the padded one was
measured, beside no engine. `products` bounds a step from below: 2 (rollout) and 6 (update) x parameters x
tokens of prompts and responses, over the operations a second of a large product on this machine; what rollout
and update take beyond it is left.

`rollout`: what tokens cost the controller and the engines, each figure beside its budget at the flagship's
size. wire: one real server of a one-layer model and long responses, all at once, over our own route and over
vLLM's JSON: microseconds of processor time a token of the API process, of the engine's processes and of this
one, and bytes a token. scale: simulated servers in another process, with the real clients, fleet, collector
and grading: microseconds a token of the event loop's thread; the collector alone with 15,360 prompts, of
which one in 30 is informative; resident bytes a token of completions; bytes a token and seconds of a file of
rollouts, in which 60 % of the tokens are certain (log-probability 0) and the others' log-probabilities are
exponential with mean 1 nat, and tokens follow Zipf's law over 152,064; `all_differ`: no token is certain.

`packing`: plans one optimizer update on samples of the given lengths (a JSON list, tokens) with the cost of
Qwen2.5-32B. imbalance: cost of the costliest rank over the mean one; fill: tokens over the budgets of all
micro-batches; lower_bound: micro-batches if the budgets of every rank could be filled to the last token,
which few lengths allow; padding: share of the processed tokens that the layout adds; seconds: planning only.

`logprob`: forward and backward of batching/logprobs.py beside `log_softmax` of all the logits, in fp32 on the
CPU. Peak bytes are resident memory over what there was before, in forward or backward, without the inputs'
gradients, which the caller keeps. `max_grad_error` is the largest difference of a gradient's elements over
the largest element. The plain version needs 2.5 times `tokens x vocab x 4` bytes. Medians over the repeats.

`train-step`: optimizer updates of one rank on the CPU in fp32, on samples of the given lengths (a JSON list,
tokens): packed end to end, and, for comparison in the same run, padded to the longest of each micro-batch.
Tokens a second count real tokens. gemm_share: matrix products in the CPU time of a packed update;
gemm_of_ceiling: their operations a second over the whole update, against a large product on the same machine;
peak_extra_bytes: resident memory of an update over what there was before. Medians over the repeats.

`weight-sync`: weight pushes of the run's own code (sync/publish.py) from ranks on this host into one real
vLLM server; no policy is built, each rank has tensors of the sizes and places that Megatron's would have. The
first push (with its plan, and verified) is not measured; seconds are medians of the others, in which all
values change. Lists are by engine worker. lower_bound_bytes: the worker's parameters without padding.
seconds_over_memcpy: against one thread that copies all workers' bytes once (memcpy_gbps, in this run).
repack_seconds: vLLM's process_weights_after_loading, in the slowest worker; without_repack_over_memcpy leaves
it out; kernel_copy_seconds: vLLM's copies of what it has repacked into the memory that its kernels know,
which count as the push's. peak_extra_bytes_sender: memory that the rank with the most keeps for pushes;
peak_extra_bytes_receiver: resident memory of a worker over what it had before, with the chunks that it maps.
`baseline`, in the same server: full-gather, every rank gathers all tensors, a bucket after the other, and
hands them whole to the worker that it carries, which loads them with vLLM's own loaders; shm-whole, the same
without the gather, from whichever rank has a part; safetensors-reload, the ranks export a checkpoint to disk
and vLLM reloads it (its reload_weights). `--delta`: pushes in which about 1 % of the elements change, with
and without sync.delta, where all ranks but the first are taken to be on another host; the link is loopback.

`delta`: what sync/delta.py saves after real updates of one rank on the CPU, with fp32 weights that are cast
to bf16 for a push. After `warmup` updates and a first push every update is followed by one. Samples are
pieces of the texts, new ones for each update, with random advantages. changed: share of the elements that
have other bf16 bits than before, by update; bytes_over_full: bytes sent, over those of all elements. Seconds
are the processor time of one thread for a GB of weights, medians: sender (compare, encode, keep), receiver
(apply, check) and one copy in memory. Below break_even_gb_per_second the delta is there earlier than all
bytes would be, where nothing overlaps.

`checkpoint`: saves of one rank on the CPU in fp32, after three that are not measured. waiting: training waits
until all is on the disk; blocked: until it may go on, in the background; until_complete: until such a save is
whole, while updates are made; update_alone and update_beside: one of these updates. memory_copy and
file_copy: as many bytes in memory, and to a file. Files are flushed to the disk (fsync). Medians.

`convert`: tools/convert_checkpoint.py both ways on a Qwen2 of random bf16 weights that is made on the spot,
beside a copy of its file through one buffer, all onto the disk (fsync). Medians over the repeats, of seconds
and of processor seconds (of the processes of --workers, too, once they have ended). peak_extra_bytes:
resident memory of this process over what it had before.

`grade`: answers a second through the grading pool with one worker: the rules dapo, auto, and math_verify for
comparison (on a tenth of the groups). Groups of 16 responses of 30 to 500 words, 80 % of the answers
integers, the others fractions and polynomials; half of the responses are right, some of them in another
spelling. The best of the repeats, each on new numbers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path


def even_length(response: str, answer: str) -> bool:
    """A verifier that random weights satisfy about half the time. Grading workers import this file for it, so
    the benchmarks themselves are imported only when they run.
    """
    return sum(map(ord, response)) % 2 == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    _add_whole_steps(commands)
    _add_parts(commands)
    _add_weight_sync(commands)
    _add_delta(commands)
    _add_checkpoint(commands)
    _add_convert(commands)
    _add_grade(commands)
    options = parser.parse_args()
    print(json.dumps(importlib.import_module(f"benchmarks.{options.module}").run(options)))


def _add_whole_steps(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    whole = commands.add_parser("step", help="whole training steps")
    whole.add_argument("--steps", type=int, default=8, help="measured steps of each run")
    whole.add_argument(
        "--max-age", type=int, help="measure strict steps and steps with this sampling.max_age"
    )
    whole.add_argument("--lengths", choices=["equal", "geometric"], default="equal", help="of the responses")
    whole.add_argument("overrides", nargs="*", metavar="section.key=value")
    whole.set_defaults(module="step")
    rollout = commands.add_parser("rollout", help="what receiving, holding and saving tokens costs")
    rollout.add_argument("--only", choices=["wire", "scale"], help="one of the two halves (default both)")
    for name, default, text in (
        ("prompts", 32, "wire: prompts in flight at once"),
        ("samples", 16, "responses to a prompt"),
        ("tokens", 1024, "wire: tokens of a response"),
        ("simulated-tokens", 20_000_000, "scale: tokens that simulated servers send"),
        ("held-tokens", 123_000_000, "scale: tokens held in memory, fewer if it is short"),
        ("saved-tokens", 4_000_000, "scale: tokens of the file of rollouts"),
        ("collector-prompts", 15_360, "scale: prompts of the collector's step"),
    ):
        rollout.add_argument(f"--{name}", type=int, default=default, help=text)
    rollout.set_defaults(module="rollout")


def _add_parts(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    planning = commands.add_parser("packing", help="micro-batches for samples of given lengths")
    planning.add_argument("--lengths", type=Path, required=True, help="JSON list of sample lengths, tokens")
    planning.add_argument(
        "--budget", type=int, default=22528, help="tokens of one micro-batch (batch.max_tokens)"
    )
    planning.add_argument("--ranks", type=int, default=128, help="data-parallel ranks")
    planning.add_argument(
        "--tp", type=int, default=1, help="tensor (and sequence) parallel ranks, for the padding"
    )
    planning.add_argument("--cp", type=int, default=1, help="context-parallel ranks, for the padding")
    planning.add_argument(
        "--fp8", choices=["tensorwise", "delayed", "blockwise", "mxfp8"], help="recipe, for the padding"
    )
    planning.set_defaults(module="packing")
    part = commands.add_parser("logprob", help="log-probabilities from hidden states")
    for name, default in (("tokens", 4096), ("vocab", 151936), ("hidden", 1024), ("repeats", 3)):
        part.add_argument(f"--{name}", type=int, default=default)
    part.set_defaults(module="logprob")
    update = commands.add_parser("train-step", help="one optimizer update on one rank, packed and padded")
    update.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face checkpoint")
    update.add_argument("--lengths", type=Path, required=True, help="JSON list of sample lengths, tokens")
    update.add_argument("--tokens", type=int, default=16384, help="take lengths from the list up to this sum")
    update.add_argument(
        "--budget", type=int, default=4096, help="tokens of one micro-batch (batch.max_tokens)"
    )
    update.add_argument("--repeats", type=int, default=3)
    update.add_argument("overrides", nargs="*", metavar="section.key=value")
    update.set_defaults(module="train_step")


def _add_weight_sync(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    push = commands.add_parser("weight-sync", help="weight pushes into one vLLM server")
    model = push.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model", type=Path, help="folder with config.json and tokenizer; weights are not read"
    )
    model.add_argument("--config", choices=["tiny", "qwen2.5-0.5b-like", "qwen2.5-1.5b-like"])
    push.add_argument("--trainer", default="tp2,pp2", help="the policy's layout: tp, pp, vpp, cp, ep, dp")
    push.add_argument("--engine", default="tp2", help="the server's tensor-parallel size")
    push.add_argument("--pushes", type=int, default=5, help="of each way; the first is not measured")
    push.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of policy and engine")
    push.add_argument(
        "--baseline", action="append", default=[], choices=["full-gather", "shm-whole", "safetensors-reload"]
    )
    push.add_argument("--delta", action="store_true", help="also pushes of few changes to another host")
    push.add_argument("overrides", nargs="*", metavar="section.key=value")
    push.set_defaults(module="weight_sync")


def _add_delta(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    delta = commands.add_parser("delta", help="deltas of the weights after real updates")
    delta.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face checkpoint")
    delta.add_argument("--texts", type=Path, required=True, help="JSONL file whose rows have a prompt")
    for name, default, text in (
        ("warmup", 12, "updates before the first push"),
        ("updates", 4, "measured updates"),
        ("tokens", 512, "tokens of an update"),
        ("message-bytes", 1 << 24, "bytes of a parcel"),
    ):
        delta.add_argument(f"--{name}", type=int, default=default, help=text)
    delta.add_argument("overrides", nargs="*", metavar="section.key=value")
    delta.set_defaults(module="delta")


def _add_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    save = commands.add_parser("checkpoint", help="how long a save keeps a rank from training")
    save.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face checkpoint")
    save.add_argument("--folder", type=Path, help="where to save (default: the system's temporary folder)")
    save.add_argument("--saves", type=int, default=5, help="measured saves of each kind")
    save.add_argument("--tokens", type=int, default=256, help="of the updates made meanwhile")
    save.add_argument("overrides", nargs="*", metavar="section.key=value")
    save.set_defaults(module="checkpoint")


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser("convert", help="conversion of checkpoints beside a plain copy")
    convert.add_argument("--gigabytes", type=float, default=1.0, help="of weights, at least 0.6")
    convert.add_argument("--workers", type=int, default=1, help="processes of a conversion")
    convert.add_argument("--repeats", type=int, default=3)
    convert.add_argument("--folder", type=Path, help="on the disk to measure (default: temporary files)")
    convert.set_defaults(module="convert")


def _add_grade(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    grade = commands.add_parser("grade", help="answers a second through the grading pool")
    grade.add_argument("--groups", type=int, default=500, help="of 16 responses, in each repeat")
    grade.add_argument("--repeats", type=int, default=5)
    grade.set_defaults(module="grade")


if __name__ == "__main__":
    sys.exit(main())
