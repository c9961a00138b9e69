"""Verifiers that misbehave when the response asks for it; loaded by the workers of test_pool.py."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

HEAVY = {
    "torch",
    "numpy",
    "megatron",
    "vllm",
    "transformers",
    "pydantic",
    "omegaconf",
    "sympy",
    "math_verify",
    "asyncio",
}


def check(response: str, answer: str) -> bool:
    if response == "hang":  # in C, holding the interpreter: no Python-level time-out would end it
        os.write(2, b"hanging\n")  # one write: two workers share the stream
        re.match("(a+)+$", "a" * 60 + "b")
    if response == "hang with a child":
        subprocess.run(["sleep", answer])
    if response == "crash":
        os._exit(3)
    if response == "exit":
        sys.exit("on purpose")
    if response == "raise":
        raise LookupError("broken on purpose")
    if response == "print":
        print("some text on stdout")
        os.write(1, b"and more\n")
        assert sys.stdin.read() == ""
    if response == "text":
        return "yes"  # type: ignore[return-value]
    return response == answer


def light(response: str, answer: str) -> bool:
    loaded = HEAVY & set(sys.modules)
    assert not loaded, f"the worker imported {sorted(loaded)}"
    return True


def meet(response: str, answer: str) -> bool:
    """True once grades of "a", "b" and "c" run at the same time; `answer` is a folder for their signs."""
    Path(answer, response).touch()
    while {path.name for path in Path(answer).iterdir()} != {"a", "b", "c"}:
        time.sleep(0.01)
    return True
