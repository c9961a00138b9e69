import aiohttp
import pytest
from support.models import TOKEN

from megatron_dapo.rollout.middleware import TOKEN_VARIABLE, RunToken


async def status(path: str, headers: list[tuple[bytes, bytes]], kind: str = "http") -> int | str:
    """What a caller sees: the status of the answer, 'app' if the request reaches the application, or
    'closed'.
    """
    sent = []

    async def app(scope, receive, send):
        sent.append({"type": "app"})

    async def send(message):
        sent.append(message)

    await RunToken(app)({"type": kind, "path": path, "headers": headers}, None, send)
    return {"app": "app", "websocket.close": "closed"}.get(sent[0]["type"]) or sent[0]["status"]


@pytest.mark.parametrize(
    ("path", "authorization", "expected"),
    [
        ("/health", [], "app"),
        ("/inference/v1/generate", [], 401),
        ("/inference/v1/generate", [b"Bearer secret"], "app"),
        ("/inference/v1/generate", [b"Bearer secret2"], 401),
        ("/inference/v1/generate", [b"Bearer "], 401),
        ("/inference/v1/generate", [b"secret"], 401),
        ("/inference/v1/generate", [b"Bearer secret", b"Bearer other"], 401),
        ("/inference/v1/generate", [b"Bearer \xff"], 401),
        ("/health/", [], 401),
        ("//health", [], 401),
        ("/pause", [], 401),
        ("/metrics", [], 401),
    ],
)
async def test_the_token_opens_every_path(monkeypatch, path, authorization, expected):
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    assert await status(path, [(b"authorization", value) for value in authorization]) == expected


async def test_our_own_paths_go_to_our_route(monkeypatch):
    """And only with the token, whatever stands behind them."""
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    reached = []

    async def app(scope, receive, send):
        reached.append("vllm")

    async def route(scope, receive, send):
        reached.append("ours")

    middleware = RunToken(app)
    monkeypatch.setattr(middleware, "_route", route)
    answers = []

    async def send(message):
        answers.append(message)

    token = [(b"authorization", b"Bearer secret")]
    for kind, path, headers in (
        ("http", "/megatron_dapo/v1/generate", token),
        ("http", "/megatron_dapo/v1/generate", []),
        ("http", "/megatron_dapo", token),
        ("http", "/inference/v1/generate", token),
        ("websocket", "/megatron_dapo/v1/generate", token),
    ):
        await middleware({"type": kind, "path": path, "headers": headers}, None, send)
    assert reached == ["ours", "vllm", "vllm", "vllm"]
    assert answers[0]["status"] == 401


async def test_websockets_are_closed_and_start_up_passes(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    assert await status("/v1/realtime", [], kind="websocket") == "closed"
    assert await status("/v1/realtime", [(b"authorization", b"Bearer secret")], kind="websocket") == "app"
    assert await status("", [], kind="lifespan") == "app"


@pytest.mark.parametrize("token", [None, ""])
def test_no_server_without_a_token(monkeypatch, token):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    if token is not None:
        monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ValueError, match=TOKEN_VARIABLE):
        RunToken(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/inference/v1/generate"),
        ("POST", "/megatron_dapo/v1/generate"),
        ("GET", "/megatron_dapo/v1/partials"),
        ("POST", "/inference/v1/abort_requests"),
        ("POST", "/v1/completions"),
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("POST", "/start_weight_update"),
        ("POST", "/update_weights"),
        ("POST", "/finish_weight_update"),
        ("POST", "/collective_rpc"),
        ("POST", "/reset_prefix_cache"),
        ("GET", "/metrics"),
        ("GET", "/weight_info"),
        ("GET", "/openapi.json"),
    ],
)
async def test_a_real_server_refuses_strangers(server, method, path):
    async with aiohttp.ClientSession() as session:
        for headers in ({}, {"Authorization": f"Bearer {TOKEN}x"}):
            async with session.request(method, server.url + path, json={}, headers=headers) as response:
                assert response.status == 401


async def test_a_real_server_tells_anyone_its_health(server):
    async with aiohttp.ClientSession() as session, session.get(server.url + "/health") as response:
        assert response.status == 200
