import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dapo.reward.pool import Grade, GradingPool

RIGHT = Grade(correct=True, outcome="graded")
WRONG = Grade(correct=False, outcome="graded")
TIMEOUT = Grade(correct=False, outcome="timeout")
ERROR = Grade(correct=False, outcome="error")
CHECK = "pool_verifiers:check"


@pytest.fixture(autouse=True)
def verifiers_on_path(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "support")


@pytest.fixture
def pool():
    with GradingPool(CHECK, workers=1, timeout_s=0.5) as pool:
        yield pool


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


async def test_grades_come_in_the_order_of_the_responses(pool):
    assert await pool.grade(["7", "8", "7"], "7") == [RIGHT, WRONG, RIGHT]
    assert await pool.grade([], "7") == []
    assert pool.counts == {"graded": 3, "timeout": 0, "error": 0}


async def test_many_groups_at_once_keep_to_themselves():
    with GradingPool("dapo", workers=2, timeout_s=10) as pool:
        groups = [[f"Answer: {n % 3}" for n in range(8)] for _ in range(32)]
        start = time.perf_counter()
        grades = await asyncio.gather(*(pool.grade(group, str(i % 3)) for i, group in enumerate(groups)))
        seconds = time.perf_counter() - start
    assert [[g.correct for g in group] for group in grades] == [
        [n % 3 == i % 3 for n in range(8)] for i in range(32)
    ]
    assert pool.counts["graded"] == 256
    assert seconds < 1.0  # 0.01 s on two idle cores; a process or thread per response would take seconds


async def test_any_text_arrives_unharmed(pool):
    strange = "\ud800 \x00 \n\r\u2028 日本 \\boxed{7}" + "x" * 2_000_000
    assert await pool.grade([strange, strange + "y"], strange) == [RIGHT, WRONG]


async def test_hanging_grade_is_killed_and_the_rest_of_the_group_graded(pool, caplog):
    start = time.monotonic()
    assert await pool.grade(["7", "hang", "7", "hang", "8"], "7") == [RIGHT, TIMEOUT, RIGHT, TIMEOUT, WRONG]
    assert 1.0 <= time.monotonic() - start < 4.0
    assert pool.counts == {"graded": 3, "timeout": 2, "error": 0}
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


async def test_time_out_is_per_response_not_per_group(tmp_path, monkeypatch):
    (tmp_path / "slow_verifier.py").write_text(
        "import time\ndef check(r, a): return time.sleep(0.15) or r == a"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with GradingPool("slow_verifier:check", workers=1, timeout_s=0.6) as pool:
        assert await pool.grade(["7"] * 8, "7") == [RIGHT] * 8


async def test_what_a_killed_verifier_started_is_killed_too(pool):
    seconds = f"{10_000_000 + os.getpid()}"  # a command line of this run alone
    assert await pool.grade(["hang with a child"], seconds) == [TIMEOUT]
    assert wait_until(lambda: not processes(lambda command, _: command.strip() == f"sleep {seconds}"))


async def test_crash_costs_one_response(pool, caplog):
    assert await pool.grade(["7", "crash", "7", "crash"], "7") == [RIGHT, ERROR, RIGHT, ERROR]
    assert pool.counts == {"graded": 2, "timeout": 0, "error": 2}
    assert len(caplog.records) == 1 and "exit status 3" in caplog.text


@pytest.mark.parametrize(
    ("response", "logged"),
    [
        ("raise", "LookupError: broken on purpose"),
        ("exit", "SystemExit: on purpose"),
        ("score", "returned -1.0, it must return True"),
    ],
)
async def test_exception_is_an_error_and_its_first_traceback_is_logged_once(pool, caplog, response, logged):
    caplog.set_level(logging.INFO)
    before = workers_of(os.getpid())
    assert await pool.grade([response, "7", response], "7") == [ERROR, RIGHT, ERROR]
    assert await pool.grade([response], "7") == [ERROR]
    assert workers_of(os.getpid()) == before  # no restart was needed
    assert len(caplog.records) == 1
    assert "Traceback" in caplog.text and logged in caplog.text


async def test_verifier_may_print_and_read_stdin(capfd):
    with GradingPool(CHECK, workers=1, timeout_s=5) as pool:  # started under the capture, to inherit it
        assert await pool.grade(["print", "7"], "7") == [WRONG, RIGHT]
    assert capfd.readouterr().out == ""


async def test_worker_that_died_between_groups_is_nobodys_error(pool):
    assert await pool.grade(["7"], "7") == [RIGHT]
    (worker,) = workers_of(os.getpid())
    os.kill(worker, signal.SIGKILL)
    assert wait_until(lambda: not alive([worker]))
    assert await pool.grade(["7"], "7") == [RIGHT]


async def test_cancelled_grade_leaves_the_pool_usable(pool):
    hanging = asyncio.create_task(pool.grade(["hang"], "7"))
    waiting = asyncio.create_task(pool.grade(["7"], "7"))
    await asyncio.sleep(0.1)
    hanging.cancel()
    waiting.cancel()
    assert await pool.grade(["7"], "7") == [RIGHT]
    assert pool.counts == {"graded": 1, "timeout": 0, "error": 0}  # only what was handed over


async def test_worker_imports_nothing_heavy(caplog):
    with GradingPool("pool_verifiers:light", workers=1, timeout_s=10) as pool:
        assert await pool.grade(["x"], "x") == [RIGHT], caplog.text


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


async def test_close_ends_all_processes_and_waiting_grades():
    pool = GradingPool(CHECK, workers=2, timeout_s=60)
    workers = workers_of(os.getpid())
    assert len(workers) == 2
    waiting = [asyncio.create_task(pool.grade(["hang"], "7")) for _ in range(4)]
    await asyncio.sleep(0.2)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 2.0
    assert alive(workers) == []
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, RuntimeError) and "closed" in str(result)
    with pytest.raises(RuntimeError, match="closed"):
        await pool.grade(["7"], "7")
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
