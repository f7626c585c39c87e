"""`tarflowlm sample --interactive`: prompts from the terminal, each continued at once."""

import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from tarflowlm.cli.options import check_stdin, not_utf8
from tarflowlm.data.prompts import read
from tarflowlm.data.streaming import TextStream
from tarflowlm.errors import UserError
from tarflowlm.generation import generate_steps
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.terminal.bars import print_notice
from tarflowlm.terminal.texts import write_out
from tarflowlm.texts import Writing, seeded_generator

HELP = """\
TEXT              continue this text
(an empty line)   go on with the text so far
/again            write the last continuation anew
/temperature 0.7  likewise /top-k 20, /top-p 0.9; without a number these two are off
/length 200       tokens to write
/stop TEXT        stop before this text, too; without a text, nowhere
/seed 3           start the random numbers anew
/quit             or Ctrl-D; Ctrl-C stops the writing"""
NUMBERS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top-k": int,
    "top-p": float,
    "length": int,
    "seed": int,
}
RENAMED = {"length": "num_tokens", "top-k": "top_k", "top-p": "top_p"}


def converse(lm: Checkpoint, writing: Writing, prompt: str | None) -> None:
    """Read and continue prompts until the input ends, or Ctrl-C comes while nothing is written.

    A mistake costs one line, and from a pipe also the exit status 2 at the end.
    """
    check_stdin()
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    session = _Session(lm, writing)
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (it lets `input` edit and repeat lines)
        print_notice("Type a text to continue; an empty line goes on; /help lists the commands.")
    line = prompt
    status = 0
    while True:
        try:
            if line is None:
                line = input("> " if is_terminal else "")
            if line.strip() == "/quit":
                break
            session.obey(line)
        except (EOFError, KeyboardInterrupt):
            if is_terminal:
                write_out("\n")
            break
        except UnicodeDecodeError as error:
            raise not_utf8(error) from None
        except UserError as error:
            print_notice(f"tarflowlm: {error}")
            status = 0 if sys.stdin.isatty() else 2
        line = None
    if status:
        sys.exit(status)


class _Session:
    """The settings, and the text so far."""

    def __init__(self, lm: Checkpoint, writing: Writing) -> None:
        self.lm = lm
        length = writing.num_tokens or max(lm.model.config.context // 2, 1)
        tau = lm.run.temperature if writing.temperature is None else writing.temperature
        self.writing = replace(writing, prompts=(), num_tokens=length, temperature=tau)
        self.stops = self.writing.read(lm).stops
        self.generator = seeded_generator(writing.seed)
        self.tokens = torch.zeros(0, dtype=torch.long)
        """The text so far."""
        self.last = self.tokens
        """The text before the last continuation."""

    def obey(self, line: str) -> None:
        """A line from the user: a text to continue, or a command."""
        name, _, value = line[1:].partition(" ")
        if not line.startswith("/"):
            if line:
                self._begin(line)
            self._write()
        elif name == "help":
            write_out(f"{HELP}\n")
        elif name == "again":
            self.tokens = self.last
            self._write()
        elif name == "stop":
            new = replace(self.writing, stop=(value,)).read(self.lm).stops if value else ()
            self.stops = (*self.stops, *new) if value else ()
            print_notice(f"stops: {', '.join(map(repr, self.stops)) or 'none'}")
        elif name in NUMBERS:
            self._set(name, value.strip())
        else:
            raise UserError(f"/{name}: no such command; /help lists them")

    def _begin(self, prompt: str) -> None:
        """Read a new text and show it."""
        tokenizer = self.lm.tokenizer
        reading = read(
            tokenizer, prompt, name="prompt", normalize=self.writing.normalize, goes_on=True
        )
        self.tokens = reading.tokens
        if reading.notice:
            print_notice(reading.notice)
        text = Text(tokenizer.decode(self.tokens.tolist()), style="bold")
        Console().print(text, end="", soft_wrap=True)

    def _set(self, name: str, value: str) -> None:
        try:
            number = None if not value and name in ("top-k", "top-p") else NUMBERS[name](value)
        except ValueError:
            raise UserError(f"{name} {value!r}: give a number, as in /help") from None
        changed: dict[str, Any] = {RENAMED.get(name, name): number}
        self.writing = replace(self.writing, **changed)
        if name == "seed":
            self.generator = seeded_generator(self.writing.seed)
        print_notice(f"{name} {'off' if number is None else number}")

    def _write(self) -> None:
        """Continue the text, shown as it comes; Ctrl-C keeps what there is."""
        prompt, writing = self.tokens, self.writing
        self.last = prompt
        tokenizer = self.lm.tokenizer
        length = len(tokenizer.decode(prompt.tolist()))
        stream = TextStream(tokenizer, self.stops, start=length, shown=length)
        assert writing.num_tokens is not None
        assert writing.temperature is not None
        steps = generate_steps(
            self.lm.model,
            num_tokens=len(prompt) + writing.num_tokens,
            prompt=prompt if len(prompt) else None,
            particles=writing.particles if len(prompt) else None,
            temperature=writing.temperature,
            top_k=writing.top_k,
            top_p=writing.top_p,
            decoder=writing.decoder,
            generator=self.generator,
        )
        written: list[Tensor] = []
        try:
            with suppress(KeyboardInterrupt):
                for tokens in steps:
                    written.append(tokens[0])
                    write_out(stream.add(tokens[0]))
                    if stream.has_stopped:
                        break
        finally:
            write_out(stream.close() + "\n")
        if stream.has_stopped:
            self.tokens = torch.from_numpy(tokenizer.encode(stream.text))
        elif written:
            self.tokens = torch.cat(written)
