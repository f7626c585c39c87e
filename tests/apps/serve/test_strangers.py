"""What clients do that know no manners: the others are answered all the same."""

import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
from serve_cases import Served, serving

import tarflowlm
from tarflowlm_apps.serve import answers

NAME = "english-mini-ar"


@pytest.fixture(scope="module")
def lm() -> tarflowlm.Pretrained:
    return tarflowlm.load(NAME)


def waits(check, seconds: float = 20.0) -> bool:
    """Whether `check` comes true in time."""
    end = time.monotonic() + seconds
    while not check() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(check())


def has_ended(client: socket.socket) -> bool:
    """Whether the server has closed a connection."""
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.slow
def test_clients_that_read_nothing_stop_nobody(lm):
    """Eight of them, as many as there are places; then they are left."""
    with serving(lm, NAME, seconds=3, buffer=4096) as served:
        asks = {"prompt": "the king", "max_tokens": 80, "n": 10, "stream": True}
        clients = [served.open(receives=4096, **asks) for _ in range(8)]
        time.sleep(1)
        assert served.texts(prompt="the king", max_tokens=4, seed=1)
        assert len(served.server.server_state.connections) >= len(clients)
        assert waits(lambda: not served.server.server_state.connections)


def test_a_slow_reader_gets_its_whole_text(lm):
    """It loses its place, and takes one again."""
    ask = {"prompt": "the king", "max_tokens": 60, "n": 20, "seed": 1}
    with serving(lm, NAME, buffer=4096, at_once=1) as served:
        client = served.open(receives=4096, stream=True, **ask)
        time.sleep(1.5)
        texts = served.texts(**ask)
        found = b""
        while b"[DONE]" not in found:
            found += client.recv(65536)
        client.close()
    # without the marks of parts of the transfer
    lines = re.findall(r"data: (\{.*?\})\n\n", re.sub(r"\r\n[0-9a-f]+\r\n", "", found.decode()))
    streamed = [""] * 20
    for line in lines:
        for choice in json.loads(line)["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_a_client_that_keeps_the_server_waiting_is_left(lm):
    with serving(lm, NAME, seconds=1) as served:
        clients = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(3)]
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        clients[1].sendall(head)
        clients[2].sendall(head + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        # half a request after a whole one
        clients.append(served.open(prompt="the king", max_tokens=2))
        assert clients[3].recv(100).startswith(b"HTTP/1.1 200")
        clients[3].sendall(head)
        assert not any(map(has_ended, clients))
        assert waits(lambda: all(map(has_ended, clients)))


@pytest.mark.slow
def test_a_long_answer_is_no_reason_to_leave(lm, monkeypatch):
    def parts(self):
        yield []
        time.sleep(2.5)
        yield [answers.part(0, "slow", "stop")]

    monkeypatch.setattr(answers.Answer, "parts", parts)
    with serving(lm, NAME, seconds=1) as served:
        assert served.texts(prompt="a") == ["slow"]


def test_whoever_leaves_is_read_for_no_more(lm, monkeypatch):
    """Neither in the middle of reading, nor in the line before it."""
    read, taken = answers.read, []

    def slow(*args, **how):
        taken.append(args[1])
        time.sleep(0.02)
        return read(*args, **how)

    monkeypatch.setattr(answers, "read", slow)
    with serving(lm, NAME, at_once=1) as served:
        with served.open(prompt=["the king"] * 1000), served.open(prompt=["a dog"] * 1000):
            assert waits(lambda: len(taken) > 2)
            time.sleep(0.2)
        assert served.texts(prompt="the land", max_tokens=2)
    assert taken.count("the king") + taken.count("a dog") < 200
    assert min(taken.count("the king"), taken.count("a dog")) == 0


def test_who_has_a_key_asks_for_it(lm):
    with serving(lm, NAME, key="secret") as served:
        body = {"model": served.name, "prompt": "a", "max_tokens": 1}
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            for path in ("completions", "models"):
                status, found = served.post(body, path, **given)
                assert (status, found["error"]["code"]) == (401, "invalid_api_key")
        assert served.post(body, Authorization="Bearer secret")[0] == 200
        assert served.post(body, Authorization="bearer secret")[0] == 200
        assert served.post(body, Authorization="Bearer sécret")[0] == 401


def test_a_host_for_others_wants_a_key(refused, monkeypatch):
    monkeypatch.delenv("TARFLOWLM_API_KEY", raising=False)
    refused("serve", "--host", "0.0.0.0", names=["--host '0.0.0.0'", "--api-key", "--no-key"])
    refused("serve", "--api-key", "a b", names=["--api-key", "without spaces"])
    refused("serve", "--api-key", "a", "--no-key", names=["--no-key with --api-key"])


@pytest.fixture
def command(tmp_path):
    """Starts the command; gives its process, its port and what it has written to stderr."""
    started = []

    def start(*options, **how):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        words = ["serve", NAME, "--port", str(port), *options]
        with (tmp_path / "errors").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "tarflowlm", *words],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                **how,
            )
        started.append(process)
        assert process.stdout.readline().startswith("http")
        return process, port, tmp_path / "errors"

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_hundred_idle_connections_and_few_descriptors(command):
    limit = (64, 64)
    process, port, errors = command(
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    )
    idle = []
    for _ in range(100):
        idle.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        idle[-1].sendall(b"POST")
    with Served(NAME, port).open(prompt="a", max_tokens=1) as client:
        client.settimeout(20)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    for one in idle:
        one.close()
    process.terminate()
    process.wait(30)
    assert errors.stat().st_size < 2000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGTERM)],
)
def test_signals_end_it_within_seconds_and_without_a_word(command, number, status):
    def usual() -> None:
        # a shell that runs the tests in the background has them ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process, port, errors = command(preexec_fn=usual)
    clients = [
        Served(NAME, port).open(prompt="a", max_tokens=30_000, stream=stream)
        for stream in (True, False) * 5
    ]
    assert clients[0].recv(100)
    process.send_signal(number)
    assert process.wait(20) == status
    assert not re.search("ERROR|Traceback", errors.read_text())
    for client in clients:
        client.close()
