"""Serves the page: on this machine alone unless asked otherwise, and nothing but the page.

Gradio serves more than a page needs (files, uploads, a proxy, its own documentation). `Guard` lets through what the
page itself calls, and tells the browser to load nothing from elsewhere.
"""

import errno
import importlib.util
import logging
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tarflowlm.errors import UserError

PORT, PORTS = 7860, 100
"""The first port that is tried, and how many."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")

PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json")
CALLS = ("queue/join", "queue/data", "cancel", "reset", "startup-events", "app_id", "info", "login_check")
FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
"""What the page calls: whole paths, calls below /gradio_api/, and folders of Gradio's own files."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'"
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware: 404 for what the page does not call, 403 for other hosts and origins, headers on the rest.

    A page elsewhere could have its own name point at this machine and so read from it, or have the browser send
    requests of its own; `hosts` are the names that are answered, to pages from there alone, or None for all.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"")
        name = host.decode("latin-1").rsplit(":", 1)[0].strip("[]")
        # browsers name the page that asks, but for plain visits and images
        is_ours = name in (self.hosts or ()) and headers.get(b"origin", host).removeprefix(b"http://") == host
        if scope["type"] != "http" or (self.hosts is not None and not is_ours):
            await _refuse(scope, send, 403)
        elif not is_allowed(scope["path"]):
            await _refuse(scope, send, 404)
        else:
            await self.app(scope, receive, _with_headers(send))


def is_allowed(path: str) -> bool:
    """Whether the page calls this path."""
    calls = path.removeprefix("/gradio_api/")
    if path in PAGES or (calls != path and calls in CALLS):
        return True
    return ".." not in path and path.startswith(FOLDERS)


def _with_headers(send: Send) -> Send:
    added = [
        (b"content-security-policy", POLICY.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ]

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sending


async def _refuse(scope: Scope, send: Send, status: int) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    text = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": text})
    await send({"type": "http.response.body", "body": b"not on this page\n"})


def check_gradio() -> None:
    """Raises UserError if gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the studio needs the package gradio: pip install 'tarflowlm[studio]'")


def free_port(host: str, port: int | None) -> int:
    """The port asked for, or the first free one from PORT on; UserError if there is none, or for a bad host."""
    for candidate in range(PORT, PORT + PORTS) if port is None else (port,):
        try:
            family = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                if os.name == "posix":
                    # a port that was left a moment ago is free
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, candidate))
        except socket.gaierror:
            raise UserError(f"host {host!r} is unknown: leave --host out for this machine alone") from None
        except PermissionError:
            raise UserError(f"port {candidate} needs more rights than you have: choose one above 1023") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"host {host}: not an address of this machine; leave --host out") from None
            continue
        return candidate
    taken = (
        f"port {port} is taken: choose another with --port, or leave it out"
        if port is not None
        else (f"ports {PORT} to {PORT + PORTS - 1} are all taken: choose another with --port")
    )
    raise UserError(taken)


class Server:
    """The page, being served until `close`."""

    def __init__(self, build: Callable[[], Any], *, host: str, port: int) -> None:
        """`build` makes the page once gradio may be imported. UserError if the address cannot be used."""
        # read when gradio is imported: no telemetry, no look for a newer version, nothing kept in the browser
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False", HF_HUB_DISABLE_TELEMETRY="1")
        # gradio asks its own page whether it is up, which must not go through a proxy
        for name in ("NO_PROXY", "no_proxy"):
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), *LOOPBACK)))
        logging.getLogger("httpx").setLevel(logging.WARNING)
        import gradio as gr
        from starlette.middleware import Middleware

        from tarflowlm.studio.style import HEAD

        hosts = (*LOOPBACK, host) if host in LOOPBACK else None
        self.blocks = build()
        try:
            _, self.url, _ = self.blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                inbrowser=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                footer_links=[],
                allowed_paths=[],
                blocked_paths=["/"],
                max_file_size=1,
                head=HEAD,
                theme=gr.themes.Default(primary_hue="sky", font=["system-ui"], font_mono=["ui-monospace"]),
                app_kwargs={"middleware": [Middleware(Guard, hosts=hosts)], "docs_url": None, "openapi_url": None},
            )
        except OSError as error:
            raise UserError(f"cannot serve at {host}:{port} ({error}): choose another --host or --port") from None

    def close(self) -> None:
        """Stop serving."""
        self.blocks.close(verbose=False)
