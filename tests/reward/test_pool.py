import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from support.bytes_as_tokens import END, as_tokens, make_byte_backend
from transformers import AutoTokenizer, ByT5Tokenizer

from megatron_dapo.errors import UserError
from megatron_dapo.reward.decoding import DecoderSource, decoder_source
from megatron_dapo.reward.jobs import FRAME_BYTES, Call, Grade, Job, Jobs
from megatron_dapo.reward.pool import GradingPool

RIGHT = Grade("correct", 1.0)
WRONG = Grade("wrong", -1.0)
TIMEOUT = Grade("timeout")
ERROR = Grade("crashed")
CHECK = "pool_verifiers:check"
BYTES = DecoderSource(library="tokenizers", body=make_byte_backend().to_str().encode())
# How responses reach the workers: as texts, or as token ids that the workers decode.
Ask = Callable[[GradingPool, list[str], str], Awaitable[list[Grade]]]


@pytest.fixture(autouse=True)
def verifiers_on_path(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "support")


@pytest.fixture
def pool():
    with GradingPool(CHECK, workers=1, timeout_s=0.5, decoder=BYTES) as pool:
        yield pool


async def ask_with_texts(pool: GradingPool, responses: list[str], answer: str) -> list[Grade]:
    return await pool.grade(responses, answer)


async def ask_with_tokens(pool: GradingPool, responses: list[str], answer: str) -> list[Grade]:
    return await asyncio.gather(*(pool.grade_tokens(as_tokens(text), answer) for text in responses))


@pytest.fixture(params=[ask_with_texts, ask_with_tokens])
def ask(request) -> Ask:
    return request.param


def processes(match: Callable[[str, int], bool]) -> list[int]:
    """Living processes by (command line, parent pid)."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX" and match(command, int(parent)):
            pids.append(int(folder.name))
    return pids


def workers_of(parent: int) -> list[int]:
    return processes(lambda command, ppid: ppid == parent and "megatron_dapo.reward.worker" in command)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in processes(lambda *_: True) if pid in pids]


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


async def hanging(capfd) -> None:
    """Wait until a worker, started under the capture, says that it hangs."""
    while "hanging" not in capfd.readouterr().err:
        await asyncio.sleep(0.02)


async def test_grades_come_in_the_order_of_the_responses(pool, ask):
    assert await ask(pool, ["7", "8", "7"], "7") == [RIGHT, WRONG, RIGHT]
    assert await ask(pool, [], "7") == []


async def test_many_groups_at_once_keep_to_themselves(ask):
    with GradingPool("dapo", workers=2, timeout_s=10, decoder=BYTES) as pool:
        groups = [[f"Answer: {n % 3}" for n in range(8)] for _ in range(32)]
        grades = await asyncio.gather(*(ask(pool, group, str(i % 3)) for i, group in enumerate(groups)))
    assert grades == [[RIGHT if n % 3 == i % 3 else WRONG for n in range(8)] for i in range(32)]


async def test_the_responses_of_one_group_are_graded_by_all_workers(ask, tmp_path):
    with GradingPool("pool_verifiers:meet", workers=3, timeout_s=30, decoder=BYTES) as pool:
        # each grade waits in that folder until all three have begun
        assert await ask(pool, ["a", "b", "c"], str(tmp_path)) == [RIGHT] * 3


async def test_any_text_arrives_unharmed(pool):
    strange = "\ud800 \x00 \n\r\u2028 日本 \\boxed{7}" + "x" * 2_000_000
    assert await pool.grade([strange, strange + "y"], strange) == [RIGHT, WRONG]


BROKEN = "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (as_tokens("½ \x00 \n\r\u2028 日本 \\boxed{7}"), "½ \x00 \n\r\u2028 日本 \\boxed{7}"),
        (as_tokens(b"a\xffb"), BROKEN),
        (as_tokens("\ud800".encode(errors="surrogatepass")), "\N{REPLACEMENT CHARACTER}" * 3),
        (np.array([END, 1_000_000], dtype=np.int32), ""),  # special, and none of the tokenizer's
        (as_tokens("0123456789" * 2000), "0123456789" * 2000),
        (as_tokens("a b c d")[::2], "abcd"),  # every other element of an array
    ],
    ids=["any characters", "invalid UTF-8", "a lone surrogate", "nothing", "20,000 tokens", "a view"],
)
async def test_any_tokens_are_decoded(pool, tokens, text):
    grades = await asyncio.gather(pool.grade_tokens(tokens, text), pool.grade_tokens(tokens, text + "y"))
    assert grades == [RIGHT, WRONG]


async def test_a_failure_to_decode_is_an_error(pool, caplog):
    assert await pool.grade_tokens(np.array([-1], dtype=np.int32), "7") == ERROR
    assert await pool.grade_tokens(as_tokens("7"), "7") == RIGHT
    assert "OverflowError" in caplog.text


async def test_hanging_grade_is_killed_and_the_rest_of_the_group_graded(pool, ask, caplog):
    start = time.monotonic()
    assert await ask(pool, ["7", "hang", "7", "hang", "8"], "7") == [RIGHT, TIMEOUT, RIGHT, TIMEOUT, WRONG]
    assert 1.0 <= time.monotonic() - start < 60  # the workers that take over need seconds to start
    assert len(caplog.records) == 1 and "reward.timeout_s=0.5" in caplog.text
    assert len(workers_of(os.getpid())) == 1


async def test_event_loop_keeps_running_while_a_grade_hangs(pool):
    gaps, done = [], False

    async def tick():
        last = time.monotonic()
        while not done:
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    ticking = asyncio.create_task(tick())
    assert await pool.grade(["hang"], "7") == [TIMEOUT]
    done = True
    await ticking
    assert max(gaps) < 0.25 and len(gaps) > 10


async def test_time_out_is_per_response_not_per_group(tmp_path, monkeypatch, ask):
    (tmp_path / "slow_verifier.py").write_text(
        "import time\ndef check(r, a): return time.sleep(0.15) or r == a"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with GradingPool("slow_verifier:check", workers=1, timeout_s=0.6, decoder=BYTES) as pool:
        assert await ask(pool, ["7"] * 8, "7") == [RIGHT] * 8


async def test_time_out_leaves_out_what_a_restarted_worker_loads(tmp_path, monkeypatch, ask):
    (tmp_path / "slow_to_load.py").write_text(
        "import time\nfrom pool_verifiers import check\ntime.sleep(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with GradingPool("slow_to_load:check", workers=1, timeout_s=0.6, decoder=BYTES) as pool:
        assert await ask(pool, ["crash", "7"], "7") == [ERROR, RIGHT]


async def test_a_cut_tokenizer_fails_at_construction():
    cut = DecoderSource(library="tokenizers", body=BYTES.body[:-10])
    with pytest.raises(UserError, match="cannot be loaded by a grading process with tokenizers"):
        GradingPool("dapo", workers=1, timeout_s=10, decoder=cut)
    assert workers_of(os.getpid()) == []


async def test_a_tokenizer_in_python_is_loaded_by_transformers(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    source = decoder_source(AutoTokenizer.from_pretrained(tmp_path))
    assert source == DecoderSource(library="transformers", body=str(tmp_path).encode())
    with GradingPool(CHECK, workers=1, timeout_s=30, decoder=source) as pool:
        tokens = np.array(AutoTokenizer.from_pretrained(tmp_path)("½ 7")["input_ids"], dtype=np.int32)
        assert await pool.grade_tokens(tokens, "½ 7") == RIGHT


async def test_what_a_killed_verifier_started_is_killed_too(pool):
    seconds = f"{10_000_000 + os.getpid()}"  # a command line of this run alone
    assert await pool.grade(["hang with a child"], seconds) == [TIMEOUT]
    assert wait_until(lambda: not processes(lambda command, _: command.strip() == f"sleep {seconds}"))


async def test_crash_costs_one_response(pool, ask, caplog):
    assert await ask(pool, ["7", "crash", "7", "crash"], "7") == [RIGHT, ERROR, RIGHT, ERROR]
    assert len(caplog.records) == 1 and "exit status 3" in caplog.text


@pytest.mark.parametrize(
    ("response", "logged"),
    [
        ("raise", "LookupError: broken on purpose"),
        ("exit", "SystemExit: on purpose"),
        ("text", "returned 'yes'; it must be True, False, a finite number"),
    ],
)
async def test_exception_is_an_error_and_its_first_traceback_is_logged_once(
    pool, ask, caplog, response, logged
):
    caplog.set_level(logging.INFO)
    before = workers_of(os.getpid())
    assert await ask(pool, [response, "7", response], "7") == [ERROR, RIGHT, ERROR]
    assert await ask(pool, [response], "7") == [ERROR]
    assert workers_of(os.getpid()) == before  # no restart was needed
    assert len(caplog.records) == 1
    assert "Traceback" in caplog.text and logged in caplog.text


async def test_verifier_may_print_and_read_stdin(capfd):
    with GradingPool(CHECK, workers=1, timeout_s=5) as pool:  # started under the capture, to inherit it
        assert await pool.grade(["print", "7"], "7") == [WRONG, RIGHT]
    assert capfd.readouterr().out == ""


async def test_worker_that_died_between_responses_is_nobodys_error(pool, ask):
    assert await ask(pool, ["7"], "7") == [RIGHT]
    (worker,) = workers_of(os.getpid())
    os.kill(worker, signal.SIGKILL)
    assert wait_until(lambda: not alive([worker]))
    assert await ask(pool, ["7"], "7") == [RIGHT]


async def test_worker_killed_while_it_grades_costs_that_response(ask, capfd):
    with GradingPool(CHECK, workers=1, timeout_s=60, decoder=BYTES) as pool:
        grading = asyncio.create_task(ask(pool, ["hang", "7"], "7"))
        await hanging(capfd)
        (worker,) = workers_of(os.getpid())
        os.kill(worker, signal.SIGKILL)
        assert await grading == [ERROR, RIGHT]


async def test_cancelled_grade_leaves_the_pool_usable_and_is_not_begun(ask, capfd, caplog):
    with GradingPool(CHECK, workers=1, timeout_s=0.5, decoder=BYTES) as pool:
        begun = asyncio.create_task(ask(pool, ["hang"], "7"))
        waiting = asyncio.create_task(ask(pool, ["hang"], "7"))
        await hanging(capfd)
        begun.cancel()
        waiting.cancel()
        assert await ask(pool, ["7"], "7") == [RIGHT]
    assert "hanging" not in capfd.readouterr().err
    assert [record.name for record in caplog.records] == ["megatron_dapo.reward.pool"]  # nothing of asyncio


async def test_worker_imports_nothing_heavy(ask, caplog):
    with GradingPool("pool_verifiers:light", workers=1, timeout_s=10, decoder=BYTES) as pool:
        assert await ask(pool, ["x"], "x") == [RIGHT], caplog.text


@pytest.mark.parametrize("spec", ["dappo", "no_such_module_at_all:check", "pool_verifiers:nothing"])
def test_broken_spec_fails_at_construction(spec):
    with pytest.raises(ValueError, match="reward.verifier="):
        GradingPool(spec, workers=2, timeout_s=10)
    assert workers_of(os.getpid()) == []


@pytest.mark.parametrize(
    ("workers", "timeout_s", "field"),
    [(0, 1.0, "workers"), (1, 0.0, "timeout_s"), (1, float("nan"), "timeout_s")],
)
def test_impossible_sizes_are_refused(workers, timeout_s, field):
    with pytest.raises(ValueError, match=f"reward.{field}="):
        GradingPool("dapo", workers=workers, timeout_s=timeout_s)


async def test_close_ends_all_processes_and_waiting_grades(ask):
    pool = GradingPool(CHECK, workers=2, timeout_s=60, decoder=BYTES)
    workers = workers_of(os.getpid())
    assert len(workers) == 2
    waiting = [asyncio.create_task(ask(pool, ["hang"], "7")) for _ in range(4)]
    await asyncio.sleep(0.2)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 2.0
    assert alive(workers) == []
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, RuntimeError) and "closed" in str(result)
    with pytest.raises(RuntimeError, match="closed"):
        await ask(pool, ["7"], "7")
    pool.close()


PARENT = """
import asyncio
from megatron_dapo.reward.pool import GradingPool
async def main():
    pool = GradingPool("pool_verifiers:check", workers=2, timeout_s=600)
    await asyncio.gather(*(pool.grade(["hang"], "7") for _ in range(2)))
asyncio.run(main())
"""


def test_workers_die_with_a_parent_that_is_killed():
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stderr=subprocess.PIPE, text=True, env=env)
    assert parent.stderr is not None
    try:
        assert [parent.stderr.readline() for _ in range(2)] == ["hanging\n"] * 2
        workers = workers_of(parent.pid)
        assert len(workers) == 2
    finally:
        parent.kill()
        parent.wait()
        parent.stderr.close()
    wait_until(lambda: not alive(workers))
    survivors = alive(workers)
    for pid in survivors:  # a failing test must not leave processes that compute for ever
        os.kill(pid, signal.SIGKILL)
    assert survivors == []


def test_forgotten_pool_ends_with_the_interpreter():
    script = (
        "from megatron_dapo.reward.pool import GradingPool; pool = GradingPool('dapo', 2, 1.0); print('up')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (0, "up\n", "")


def test_a_worker_takes_its_share_of_what_waits():
    async def main() -> None:
        call = Call("text", "7", ["dapo"], None, 9)
        jobs = Jobs(workers=2)
        jobs.put([Job(call, index, b"") for index in range(9)])
        first = [job.index for job in jobs.take(256)]
        assert first == [0, 1, 2, 3, 4]  # half of nine and one
        assert [job.index for job in jobs.take(2)] == [5, 6]
        jobs.put([Job(call, 9, b"x" * FRAME_BYTES)], first=True)
        assert [job.index for job in jobs.take(256)] == [9]  # as many bytes as go at once
        assert [job.index for job in jobs.close()] == [7, 8]
        assert jobs.take(256) == [] and not jobs.put([Job(call, 0, b"")])

    asyncio.run(main())


async def test_of_responses_sent_at_once_one_is_to_blame(pool):
    quick = ["7", "8"] * 500
    await pool.grade(quick, "7")  # from now on several go at once
    texts = [*quick[:100], "crash", *quick[:100], "hang", *quick[:100]]
    expected = [RIGHT, WRONG] * 50
    assert await pool.grade(texts, "7") == [*expected, ERROR, *expected, TIMEOUT, *expected]


async def test_a_row_may_name_its_rule(pool, ask):
    assert await ask(pool, ["Answer: 7"], "7") == [WRONG]  # pool_verifiers:check wants it verbatim
    grades = await pool.grade(["Answer: 7", "Answer: 8", "7"], "7", rule="dapo")
    assert grades == [RIGHT, WRONG, Grade("no_answer", -1.0)]
    assert [grade.extracted for grade in grades] == ["7", "8", None]
    assert (await pool.grade_tokens(as_tokens("Answer: 7"), "7", rule="dapo")) == RIGHT
    assert await ask(pool, ["7"], "7") == [RIGHT]


async def test_a_row_that_names_no_rule_is_the_users_to_mend(pool):
    good = asyncio.create_task(pool.grade(["7"], "7"))
    with pytest.raises(UserError, match="reward.verifier='dappo' must be"):
        await pool.grade(["7", "7"], "7", rule="dappo")
    assert await good == [RIGHT]


async def test_further_rules_add_scores_and_see_the_row(tmp_path, monkeypatch):
    (tmp_path / "row_rule.py").write_text("def worth(response, answer, row): return row['worth']")
    monkeypatch.syspath_prepend(tmp_path)
    with GradingPool("dapo", workers=1, timeout_s=10, rules=["row_rule:worth", "exact"]) as pool:
        (grade,) = await pool.grade(["Answer: 8"], "7", row=lambda: {"worth": 0.5})
        assert (grade.outcome, grade.score, grade.extra) == ("wrong", -1.0, (0.5, -1.0))
        assert await pool.grade(["Answer: 7"], "7", row=lambda: {"worth": None}) == [ERROR]
    with pytest.raises(UserError, match="reward.verifier='dappo'"):
        GradingPool("dapo", workers=1, timeout_s=10, rules=["dappo"])


async def test_one_grade_may_take_so_much_memory(tmp_path, monkeypatch):
    (tmp_path / "hungry.py").write_text("def rule(response, answer): return len(bytes(int(response))) > 0")
    monkeypatch.syspath_prepend(tmp_path)
    with GradingPool("hungry:rule", workers=1, timeout_s=10, memory_bytes=1 << 28) as pool:
        assert await pool.grade([str(1 << 27), str(1 << 29), str(1 << 27)], "7") == [RIGHT, ERROR, RIGHT]
