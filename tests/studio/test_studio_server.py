"""What is served and what is not, and how the command is refused; without a browser, and without gradio."""

import asyncio
import importlib.util
import socket

import pytest

from tarflowlm.errors import UserError
from tarflowlm.studio.server import Guard, free_port, is_allowed


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/upload",
        "/gradio_api/upload_progress",
        "/gradio_api/proxy=http://elsewhere/",
        "/gradio_api/run/predict",
        "/gradio_api/call/write",
        "/gradio_api/component_server",
        "/gradio_api/openapi.json",
        "/gradio_api/deep_link",
        "/gradio_api/runs",
        "/gradio_api/queue/join/../../file=/etc/passwd",
        "/assets/../../../etc/passwd",
        "/static/..%2f/x",
        "/gradio_api/heartbeat/../file=x",
        "/docs",
        "/monitoring",
        "/login",
        "/etc/passwd",
        "",
    ],
)
def test_only_the_page_is_served(path):
    assert not is_allowed(path)


@pytest.mark.parametrize("path", ["/", "/config", "/assets/index.js", "/gradio_api/queue/join"])
def test_the_page_is_served(path):
    assert is_allowed(path)


def ask(
    path: str, host: str, hosts: tuple[str, ...] | None, kind: str = "http", origin: str | None = None
) -> list[dict]:
    """What a guarded application answers."""
    sent: list[dict] = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})

    async def send(message):
        sent.append(message)

    async def receive():
        return {}

    headers = [(b"host", host.encode()), *([] if origin is None else [(b"origin", origin.encode())])]
    scope = {"type": kind, "path": path, "headers": headers}
    asyncio.run(Guard(app, hosts)(scope, receive, send))
    return sent


@pytest.mark.parametrize(
    ("path", "host", "hosts", "status"),
    [
        ("/", "127.0.0.1:7860", ("127.0.0.1", "localhost"), 200),
        ("/", "localhost", ("127.0.0.1", "localhost"), 200),
        ("/", "[::1]:7860", ("::1",), 200),
        ("/", "elsewhere.example:7860", ("127.0.0.1", "localhost"), 403),
        ("/", "", ("127.0.0.1",), 403),
        ("/", "192.168.0.2:7860", None, 200),
        ("/gradio_api/upload", "127.0.0.1", ("127.0.0.1",), 404),
    ],
)
def test_a_request_is_guarded(path, host, hosts, status):
    start = ask(path, host, hosts)[0]
    assert start["status"] == status
    if status == 200:
        assert b"default-src 'self'" in dict(start["headers"])[b"content-security-policy"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:7860", 200),
        ("http://elsewhere.example", 403),
        ("http://127.0.0.1:8888", 403),
        ("null", 403),
    ],
)
def test_other_pages_cannot_ask(origin, status):
    path, host = "/gradio_api/queue/join", "127.0.0.1:7860"
    assert ask(path, host, ("127.0.0.1",), origin=origin)[0]["status"] == status
    assert ask(path, host, None, origin=origin)[0]["status"] == 200


def test_no_websocket_is_opened():
    assert ask("/", "127.0.0.1", None, "websocket")[0]["type"] == "websocket.close"


def test_a_taken_port_is_passed_over_unless_it_was_asked_for():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken: choose another"):
            free_port("127.0.0.1", port)
        assert free_port("127.0.0.1", None) != port


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(UserError, match="not an address of this machine"):
        free_port("192.0.2.1", None)


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["no/such/run"], ["no/such/run", "english-mini"]),
        (["--port", "0"], ["port 0"]),
        (["--port", "70000"], ["port 70000"]),
    ],
)
def test_the_command_refuses_in_one_line(refused, argv, names):
    refused("studio", *argv, names=names)


def test_the_missing_extra_is_named(refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else find(name, *a))
    refused("studio", names=["pip install 'tarflowlm[studio]'"])
