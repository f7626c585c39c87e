"""A server on a thread, and requests to it."""

import json
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
    lm: tarflowlm.Pretrained

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def post(self, body: object, path: str = "completions", kind: str = "application/json"):
        """The status of a request, and the answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=120) as found:
                return found.status, json.loads(found.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

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
def serving(lm: tarflowlm.Pretrained, name: str):
    from tarflowlm_apps.address import names_of
    from tarflowlm_apps.serve.server import application

    at = socket.create_server(("127.0.0.1", 0))
    app = application(lm, name, 2, names_of("127.0.0.1"))
    how = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(how)
    thread = threading.Thread(target=server.run, args=([at],), daemon=True)
    thread.start()
    try:
        yield Served(name, at.getsockname()[1], lm)
    finally:
        server.should_exit = True
        thread.join(20)


def fixture_of(model: str):
    @pytest.fixture(scope="session")
    def made():
        with serving(tarflowlm.load(model), model) as served:
            yield served

    return made


twin = fixture_of("english-mini-ar")
flow = fixture_of("english-mini")
passes = fixture_of("english-passes")
pieces = fixture_of("english-small-ar")  # its tokens hold the space before a word
