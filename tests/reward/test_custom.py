"""Rules of the user's: functions of modules, sync or async, and services over HTTP."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from megatron_dapo.errors import UserError
from megatron_dapo.reward.custom import read_verdict
from megatron_dapo.reward.rules import load_rule
from megatron_dapo.reward.verdict import Verdict

MODULE = """
not_a_function = 3
def one_argument(response): return True
def right(response, answer): return response == answer
async def later(response, answer):
    import asyncio
    await asyncio.sleep(0)
    return 0.25
def of_the_row(response, answer, row): return {"score": row["worth"], "correct": True, "extracted": "x"}
def optional(response, answer, row=None): return row is not None
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_rule_module.py").write_text(MODULE)
    (tmp_path / "broken_rule_module.py").write_text("import does_not_exist_anywhere")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, Verdict("correct", 1.0)),
        (False, Verdict("wrong", -1.0)),
        (1, Verdict("correct", 1.0)),
        (0.99, Verdict("wrong", 0.99)),
        (-1.0, Verdict("wrong", -1.0)),
        (np.float32(0.5), Verdict("wrong", 0.5)),
        (np.True_, Verdict("correct", 1.0)),
        ({"score": 0.5}, Verdict("wrong", 0.5)),
        ({"score": 0.5, "correct": True, "extracted": "7"}, Verdict("correct", 0.5, "7")),
        ({"score": True, "correct": None}, Verdict("correct", 1.0)),
    ],
)
def test_what_a_rule_may_say(value, expected):
    assert read_verdict(value, "it") == expected


@pytest.mark.parametrize(
    "value",
    [None, "yes", float("nan"), float("inf"), {}, {"correct": True}, {"score": 1, "correct": 1}, [1.0]],
)
def test_anything_else_is_refused(value):
    with pytest.raises(TypeError, match="it must be True, False, a finite number"):
        read_verdict(value, "it")


def test_functions_of_a_module(user_module):
    assert load_rule("user_rule_module:right")("a", "a", {}).decision == "correct"
    later = load_rule("user_rule_module:later")
    assert later("a", "b", {}) == later("a", "b", {}) == Verdict("wrong", 0.25)
    assert load_rule("user_rule_module:of_the_row")("a", "b", {"worth": 0.5}) == Verdict("correct", 0.5, "x")
    assert load_rule("user_rule_module:optional")("a", "b", {}).decision == "correct"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dappo", "must be 'dapo', 'dapo_boxed', 'math_verify', 'auto', 'exact', 'choice', 'code', 'package"),
        ("", "must be 'dapo'"),
        (":right", "must be 'dapo'"),
        ("user_rule_module:", "must be 'dapo'"),
        ("no_such_module_at_all:right", "PYTHONPATH"),
        ("broken_rule_module:right", "does_not_exist_anywhere"),
        ("user_rule_module:wrong", "it offers later, of_the_row, one_argument, optional, right"),
        ("user_rule_module:not_a_function", "has no function 'not_a_function'"),
        ("user_rule_module:one_argument", "must take \\(response, answer\\) or \\(response, answer, row\\)"),
        ("http://", "has no host"),
    ],
)
def test_what_is_wrong_with_a_rule_is_explained(user_module, spec, message):
    with pytest.raises(UserError, match=message) as error:
        load_rule(spec)
    assert f"reward.verifier={spec!r}" in str(error.value)


@pytest.fixture
def service():
    """Answers with the row's `reply` and closes the connection where the row says so."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["response"] == "\ud800" and asked["answer"] == "7" and self.path == "/grade?v=1"
            body = json.dumps(asked["row"]["reply"]).encode()
            self.send_response(asked["row"].get("status", 200))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = asked["row"].get("close", False)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/grade?v=1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_service(service):
    rule = load_rule(service, timeout_s=5)
    for row in ({"reply": True, "close": True}, {"reply": 1}, {"reply": {"score": 2}}):
        assert rule("\ud800", "7", row).decision == "correct"
    with pytest.raises(ConnectionError, match="answered 500"):
        rule("\ud800", "7", {"reply": True, "status": 500})
    with pytest.raises(TypeError, match="returned 'yes'"):
        rule("\ud800", "7", {"reply": "yes"})
