"""A class at one studio: 25 clients that write, fill in and score, and their waiting times.

    python benchmarks/studio.py                             # 25 clients, 4 requests each
    python benchmarks/studio.py --clients 3 --requests 1    # a try of half a minute
    python benchmarks/studio.py --bad 100                   # and 100 requests that make no sense

It starts a studio of its own, speaks its protocol, and ends it. A client reads its result for
`--think` seconds before it asks again. `wait` is the time until the answer less that of the work.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = {"Write": "Once upon a time there was", "Fill in": None, "Score": None}
"""The buttons that are pressed in turn, with a text for the first box, or its own."""
PATIENCE = 1200.0  # seconds after which an answer counts as lost


@dataclass
class Event:
    """What a button of the page asks for: its number, and the values of its inputs."""

    number: int
    values: list[Any]
    texts: list[int] = field(default_factory=list)
    """The places of text boxes among the inputs."""


@dataclass
class Answer:
    kind: str
    seconds: float
    """From the request to the answer."""
    work: float
    """How long the work has taken, as the page says."""
    is_whole: bool
    """Whether the answer has a result."""


class Page:
    """One visitor of a studio."""

    def __init__(self, url: str) -> None:
        self.api = f"{url.rstrip('/')}/gradio_api"
        with urllib.request.urlopen(f"{url.rstrip('/')}/config", timeout=60) as found:
            self.config = json.load(found)
        self.session = uuid.uuid4().hex

    def event(self, label: str) -> Event:
        """The event of the first button with this label."""
        components = {one["id"]: one for one in self.config["components"]}
        (button, *_) = [
            one["id"]
            for one in self.config["components"]
            if one["type"] == "button" and one["props"].get("value") == label
        ]
        (found, *_) = [
            one for one in self.config["dependencies"] if [button, "click"] in one["targets"]
        ]
        inputs = [components[number] for number in found["inputs"]]
        texts = [i for i, one in enumerate(inputs) if one["type"] == "textbox"]
        values = [one["props"].get("value") for one in inputs]
        return Event(found["id"], values, texts)

    def join(self, number: object, values: object) -> int:
        """Send a request; the status of the answer."""
        body = {"data": values, "fn_index": number, "session_hash": self.session}
        return post(f"{self.api}/queue/join", json.dumps(body).encode())

    def result(self) -> str:
        """Wait for the last request, and give the HTML of its result."""
        url = f"{self.api}/queue/data?session_hash={self.session}"
        with urllib.request.urlopen(url, timeout=PATIENCE) as lines:
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                message = json.loads(line[5:])
                if message["msg"] == "process_completed":
                    output = message["output"]
                    return str(output["data"][0]) if output.get("data") else str(output)
        return "the connection has ended"


def post(url: str, body: bytes) -> int:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code


def client(url: str, index: int, requests: int, think: float, answers: list[Answer]) -> None:
    """Ask for one thing after the other, and note every answer."""
    page = Page(url)
    for turn in range(requests):
        kind, text = list(KINDS.items())[(index + turn) % len(KINDS)]
        event = page.event(kind)
        if text is not None:
            event.values[event.texts[0]] = text
        began = time.perf_counter()
        status = page.join(event.number, event.values)
        html = page.result() if status == 200 else f"status {status}"
        seconds = time.perf_counter() - began
        found = re.search(r"<b>([\d.,]+) (ms|s)</b> in all", html)
        work = 0.0
        if found is not None:
            work = float(found[1].replace(",", "")) / (1000 if found[2] == "ms" else 1)
        answers.append(Answer(kind, seconds, work, found is not None))
        time.sleep(think)


def odd_requests(page: Page, count: int) -> dict[int, int]:
    """Send requests that make no sense; how often each status came back."""
    event = page.event("Write")
    values = [None, "x" * 10**6, float("1e308"), [], {}, -1, True, "../../etc/passwd", "<script>"]
    statuses: dict[int, int] = {}
    for number in range(count):
        value = values[number % len(values)]
        attempts = (
            lambda v=value: page.join(event.number, [v] * len(event.values)),
            lambda v=value: page.join(event.number, v),
            lambda v=value: page.join(v, event.values),
            lambda n=number: page.join(10_000 + n, []),
            lambda: post(f"{page.api}/queue/join", b"{"),
            lambda n=number: post(f"{page.api}/run/{n}", b"{}"),
        )
        status = attempts[number % len(attempts)]()
        statuses[status] = statuses.get(status, 0) + 1
    return statuses


def peak_memory(pid: int) -> float:
    """The most memory that a process has held, in MB; NaN where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return float("nan")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
    return float("nan") if found is None else int(found[1]) / 1024


def report(answers: list[Answer], asked: int) -> None:
    """A line for every kind of request, and one for all."""
    print(f"{'request':10}{'answers':>9}{'work, median':>14}{'wait, median':>14}{'wait, most':>12}")
    # an answer without a result has done no work
    whole = [one for one in answers if one.is_whole]
    kinds = {kind: [one for one in whole if one.kind == kind] for kind in KINDS}
    for name, some in {**kinds, "all": whole}.items():
        if not some:
            continue
        work = statistics.median(one.work for one in some)
        waits = [one.seconds - one.work for one in some]
        print(
            f"{name:10}{len(some):9}{work:12.1f} s{statistics.median(waits):12.1f} s"
            f"{max(waits):10.1f} s"
        )
    print(f"{len(whole)} of {asked} requests were answered with a result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="as of `tarflowlm studio`")
    parser.add_argument("--clients", type=int, default=25)
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--think", type=float, default=10.0, help="seconds between two requests")
    parser.add_argument("--bad", type=int, default=0, help="requests that make no sense, after")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "tarflowlm", "studio", *arguments.models, "--no-browser"]
    # gradio prints a stack for each request that makes no sense
    errors = subprocess.DEVNULL if arguments.bad else None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as studio:
        try:
            assert studio.stdout is not None
            url = studio.stdout.readline().strip()
            if not url:
                sys.exit("the studio has not started")
            before = peak_memory(studio.pid)
            answers: list[Answer] = []
            rest = (arguments.requests, arguments.think, answers)
            threads = [
                threading.Thread(target=client, args=(url, index, *rest))
                for index in range(arguments.clients)
            ]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            minutes = (time.perf_counter() - began) / 60
            report(answers, arguments.clients * arguments.requests)
            after = peak_memory(studio.pid)
            print(
                f"{minutes:.1f} minutes; memory {before:.0f} MB at the start, {after:.0f} at most"
            )
            if arguments.bad:
                print("statuses of odd requests:", odd_requests(Page(url), arguments.bad))
                last: list[Answer] = []
                client(url, 0, 1, 0.0, last)
                print("a request after them:", "answered" if last[0].is_whole else "lost")
        finally:
            studio.terminate()


if __name__ == "__main__":
    main()
