"""What clients do that know no manners: the others are answered all the same."""

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
