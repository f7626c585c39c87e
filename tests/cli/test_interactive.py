"""`sample --interactive`: fed by a pipe, and at a terminal."""

import contextlib
import io
import os
import select
import sys
import time

import pytest

from tarflowlm.data import TEXT8_ALPHABET

pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")


@pytest.fixture
def talk(run, model, monkeypatch):
    """talk(*lines, options=(), status=0): what `sample --interactive` answers to these lines."""

    def call(*lines: str, options: tuple[object, ...] = (), status: int = 0):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
        done = run("sample", model, "--interactive", "--length", 40, *options)
        assert done.status == status, done.err
        return done

    return call


def test_prompts_are_continued_and_the_same_session_repeats(talk, model):
    lines = talk("ab c", "zz").out.splitlines()
    assert [len(line) for line in lines] == [44, 42]
    assert [line[:2] for line in lines] == ["ab", "zz"]
    assert set("".join(lines)) <= set(TEXT8_ALPHABET)
    assert talk("ab c", "zz").out.splitlines() == lines
    assert talk("ab c", options=("--seed", 1)).out.splitlines() != lines[:1]
    assert talk("zz", options=("--prompt", "ab c")).out.splitlines() == lines


def test_an_empty_line_goes_on_and_again_writes_anew(talk):
    first, more, again = talk("ab c", "", "/again").out.splitlines()
    assert first.startswith("ab c")
    assert len(more) == len(again) == 40
    assert more != again
    # without any text it begins one
    assert len(talk("").out.splitlines()[0]) == 40


def test_settings_change_what_is_written(talk):
    done = talk(
        "/length 7", "/temperature 0.01", "ab", "/again", "/seed 3", "ab", "/seed 3", "ab", "/top-k 2", "/top-k"
    )
    first, again, third, fourth = done.out.splitlines()
    assert [len(line) for line in (first, again, third)] == [9, 7, 9]
    assert third == fourth
    assert "length 7\ntemperature 0.01\n" in done.err
    assert done.err.endswith("top-k 2\ntop-k off\n")


def test_a_stop_ends_the_text_which_goes_on_from_there(talk):
    (whole,) = talk("ab").out.splitlines()
    stop = whole[20:22]
    at = whole.index(stop, 2)
    lines = talk(f"/stop {stop}", "ab", "/stop", "").out.splitlines()
    assert lines[0] == whole[:at]
    assert len(lines[1]) == 40


def test_mistakes_cost_a_line_and_go_on(talk):
    mistakes = ["/nope", "/seed x", "/temperature 0", "/temperature", "/length 0", "a!", "/stop !", "/seed -1"]
    done = talk(*mistakes, "/help", "Ab", "/quit", "never read", status=2)
    errors = done.err.splitlines()
    assert [error.startswith("tarflowlm: ") for error in errors] == [True] * len(mistakes) + [False]
    assert "no such command" in errors[0]
    assert "lower case" in errors[-1]
    assert "/again" in done.out
    assert done.out.splitlines()[-1].startswith("ab")
    assert len(talk("ab", options=("--prompt", "a!"), status=2).out.splitlines()) == 1


def test_bytes_that_are_not_utf8_cost_a_line(run, model, monkeypatch):
    # as Python reads a pipe in the locales C and C.UTF-8
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\nab\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", stdin)
    done = run("sample", model, "--interactive", "--length", 5)
    assert (done.status, len(done.out)) == (2, 8)
    assert "the prompt is not UTF-8 (character 0 is byte 0xff)" in done.err


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_at_a_terminal_control_c_stops_the_writing_and_then_the_loop(model):
    import pty

    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, "-m", "tarflowlm", "sample", str(model), "--interactive", "--length", "100000"]
        os.execv(sys.executable, command)
    seen, until = "", time.monotonic() + 120

    def expect(text: str) -> None:
        nonlocal seen
        while text not in seen:
            assert time.monotonic() < until, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 1000).decode()
        seen = seen.partition(text)[2]

    try:
        expect("> ")
        os.write(terminal, b"ab c\n")
        expect("ab c")
        # the echo, then the text
        expect("ab c")
        expect("a")
        os.write(terminal, b"\x03")
        expect("> ")
        os.write(terminal, b"/length 5\n")
        expect("length 5")
        expect("> ")
        # which costs the exit status only where nobody sees it
        os.write(terminal, b"/nope\n")
        expect("no such command")
        expect("> ")
        # Python's readline misses a Ctrl-C that comes after the prompt but before it waits for a key: press it again
        with contextlib.suppress(OSError):
            ended = False
            while not ended:
                assert time.monotonic() < until, seen
                os.write(terminal, b"\x03")
                while not ended and select.select([terminal], [], [], 1)[0]:
                    ended = not os.read(terminal, 1000)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
