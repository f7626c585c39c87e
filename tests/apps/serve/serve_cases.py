"""A server on a thread, and requests to it."""

import json
import logging
import socket
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

import tarflowlm

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")


@dataclass
class Served:
    """A model, and where it is served."""

    name: str
    port: int
    lm: tarflowlm.Pretrained | None = None
    server: uvicorn.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def post(
        self,
        body: object,
        path: str = "completions",
        kind: str = "application/json",
        **headers: str,
    ):
        """The status of a request, and the answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers |= {"Content-Type": kind}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as found:
                return found.status, json.loads(found.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def open(self, *, receives: int = 0, **fields: object) -> socket.socket:
        """A connection on which a request was sent; `receives` limits the bytes that it takes."""
        data = json.dumps({"model": self.name} | fields).encode()
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        client = socket.socket()
        if receives:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
        client.connect(("127.0.0.1", self.port))
        client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + data)
        return client

    def ask(self, **fields: object) -> dict:
        status, found = self.post({"model": self.name} | fields)
        assert status == 200, found
        return found

    def texts(self, **fields: object) -> list[str]:
        return [choice["text"] for choice in self.ask(**fields)["choices"]]

    def stream(self, **fields: object) -> list[dict]:
        """The events of a stream, without the last one."""
        body = json.dumps({"model": self.name, "stream": True} | fields).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/completions", body, head)
        with urllib.request.urlopen(request, timeout=120) as found:
            lines = [line for line in found.read().decode().split("\n\n") if line]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


@contextmanager
def serving(lm: tarflowlm.Pretrained, name: str, *, seconds: int = 60, buffer: int = 0, **limits):
    """Clients have `seconds`; a `buffer` limits the bytes that the system takes for them."""
    from tarflowlm_apps.address import names_of
    from tarflowlm_apps.serve.connection import settings
    from tarflowlm_apps.serve.server import application

    at = socket.create_server(("127.0.0.1", 0))
    if buffer:
        at.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    limits = {"key": None, "texts": 1024, "at_once": 8} | limits
    app = application(lm, name, 2, names_of("127.0.0.1"), **limits)
    server = uvicorn.Server(settings(app, seconds))
    logging.getLogger("uvicorn.error").setLevel("CRITICAL")
    thread = threading.Thread(target=server.run, args=([at],), daemon=True)
    thread.start()
    try:
        yield Served(name, at.getsockname()[1], lm, server)
    finally:
        server.should_exit = True
        thread.join(20)
