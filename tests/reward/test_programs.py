"""The rule `code`: programs against unit tests, and what programs do that want to harm or to deceive."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dapo.errors import UserError
from megatron_dapo.reward import program_child
from megatron_dapo.reward.programs import isolation, program_rule, read_tests

SUMS = json.dumps({"inputs": ["1 2", "3 4"], "outputs": ["3\n", "7"]})
CALLS = json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, [7]]})
ASSERTS = "import math\nassert add(1, 2) == 3\nassert add(3, 4) == math.floor(7.5)"
ADD = "def add(a, b):\n    return a + b"
SOLUTION = "class Solution:\n    def add(self, a, b):\n        return a + b"


def judge(program: str, answer: str, timeout_s: float = 20.0):
    return program_rule(timeout_s)(f"I write\n```python\n{program}\n```\nand that is it.", answer, {})


@pytest.mark.parametrize(
    ("program", "answer", "score"),
    [
        ("print(sum(map(int, input().split())))", SUMS, 1.0),
        ("print(3)", SUMS, 0.0),  # one of two
        ("print(4)", SUMS, -1.0),
        ("print('3  ')\nprint()", json.dumps({"inputs": [""], "outputs": ["3"]}), 1.0),
        (ADD, CALLS, 1.0),
        (SOLUTION, CALLS, 1.0),
        ("def add(a, b): return 7", CALLS, 0.0),
        (ADD, ASSERTS, 1.0),
        ("def add(a, b): return 3", ASSERTS, 0.0),
        (ADD, "def check(f):\n    assert f(1, 2) == 3\ncheck(add)", 1.0),
    ],
)
def test_the_score_is_the_share_of_passed_tests(program, answer, score):
    verdict = judge(program, answer)
    assert verdict.score == score
    assert verdict.decision == ("correct" if score == 1 else "wrong")
    assert verdict.extracted == program + "\n"


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import ctypes\nctypes.string_at(0)",
        "x = bytearray(8 << 30)",
        "x = '\x00'",
        "\ud800",
        "(" * 100_000,
        "open('result', 'w').write('passed')\nimport os\nos._exit(0)",
    ],
    ids=["_exit", "exit", "raise", "segfault", "8 GiB", "NUL", "surrogate", "nested", "forged"],
)
def test_what_ends_the_process_passes_no_test(program):
    verdict = judge(program, "assert True")
    assert (verdict.decision, verdict.score) == ("wrong", -1.0)


def test_endless_programs_share_the_time_and_leave_nothing():
    start = time.monotonic()
    seconds = f"{20_000_000 + time.monotonic_ns() % 10**7}"  # a command line of this test alone
    child = f"import subprocess\nsubprocess.Popen(['sleep', '{seconds}'], start_new_session=True)"
    verdict = judge(f"{child}\nwhile True: pass", SUMS, timeout_s=2.0)
    assert (verdict.decision, verdict.score) == ("wrong", -1.0)
    assert time.monotonic() - start < 10
    while _runs(seconds):  # what the kernel ends with its namespace is gone a moment later
        assert time.monotonic() - start < 15
        time.sleep(0.02)


def _runs(argument: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in path.read_bytes():
                return True
    return False


def test_there_is_no_network():
    program = """import socket
try:
    socket.create_connection(("127.0.0.1", int(input())), timeout=1)
except OSError:
    print("none")"""
    with_server = "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
    process = subprocess.Popen(
        [sys.executable, "-c", with_server + "print(server.getsockname()[1], flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        port = process.stdout.readline()
        verdict = judge(program, json.dumps({"inputs": [port], "outputs": ["none"]}))
        process.communicate("")
    assert verdict.decision == "correct"
    assert isolation().startswith(("in a network namespace", "by refusing sockets"))


@pytest.mark.parametrize(
    "code", ["import socket; socket.socket()", "import os; os.system('true')", "import os; os.fork()"]
)
def test_without_namespaces_sockets_and_processes_are_refused(code):
    folder = str(Path(program_child.__file__).parent)
    start = f"import sys; sys.path.append({folder!r}); import program_child; program_child.refuse_network(); "
    done = subprocess.run([sys.executable, "-I", "-c", start + code], capture_output=True, text=True)
    assert done.returncode == 1 and "PermissionError" in done.stderr


def test_a_response_without_a_program():
    assert program_rule(5.0)("print(3)", SUMS, {}) == ("no_answer", -1.0, None)


@pytest.mark.parametrize("answer", ["", "7", "add(", '{"inputs": ["1"], "outputs": []}', '{"a": 1}'])
def test_an_answer_without_tests_is_refused(answer):
    with pytest.raises(UserError, match="finds no test"):
        read_tests(answer)
