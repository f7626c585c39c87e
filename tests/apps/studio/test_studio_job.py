"""Work for a visitor ends when nobody waits, when the time is over, or by an error; a taken port is
refused.
"""

import importlib.util
import socket
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial

import pytest

from tarflowlm.errors import UserError, check_package
from tarflowlm_apps.address import listen
from tarflowlm_apps.studio import job
from tarflowlm_apps.studio.job import Job


def endless(job: Job) -> None:
    while True:
        time.sleep(0.002)
        job.advance()


def test_work_is_followed_to_its_end():
    following, results = Job("working", 3), []

    def work():
        following.advance(3)
        return 7

    def view():
        results.append((yield from following.follow(work, str)))

    list(view())
    assert (results, following.advanced) == ([7], 3)


def test_work_ends_when_nobody_waits():
    ended, job = threading.Event(), Job("working")

    def work():
        try:
            endless(job)
        except CancelledError:
            ended.set()
            raise

    steps = job.follow(work, str)
    next(steps)
    steps.close()
    assert ended.wait(5)


def test_work_ends_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(job, "SECONDS", 0.05)
    following = Job("working")
    with pytest.raises(UserError):
        list(following.follow(lambda: endless(following), str))


def test_one_works_at_a_time():
    running, most = [], []

    def work():
        running.append(1)
        most.append(len(running))
        time.sleep(0.03)
        running.pop()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: list(Job("working").follow(work, str)), range(3)))
    assert most == [1, 1, 1]


def test_those_who_wait_have_their_turn_in_order_and_know_it():
    """One who leaves makes room; the time limit of the others begins with their turn."""
    go, order = threading.Event(), []
    jobs = [Job(f"{number}") for number in range(4)]

    def work(number):
        if number == 0:
            go.wait(5)
        order.append(number)

    steps = [job.follow(partial(work, number), str) for number, job in enumerate(jobs)]
    for one in steps:
        next(one)
    assert [job.state for job in jobs[:3]] == [
        "0",
        "waiting: 1 request before yours",
        "waiting: 2 requests before yours",
    ]
    steps[1].close()
    deadline = time.monotonic() + 5
    while "1 request " not in jobs[2].state and time.monotonic() < deadline:
        time.sleep(0.01)
    assert jobs[3].state == "waiting: 2 requests before yours"
    go.set()
    for number in (0, 2, 3):
        list(steps[number])
    assert order == [0, 2, 3]


def test_a_port_that_is_taken_and_a_host_elsewhere_are_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*: choose another"):
            listen("127.0.0.1", port)
        listen("127.0.0.1", None).close()
    with pytest.raises(UserError, match=r"cannot serve at 192\.0\.2\.1 "):
        listen("192.0.2.1", None)


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .*gradio.*matplotlib"):
        check_package("gradio", "studio")
