"""`tarflowlm sample --interactive`: prompts from the terminal, each continued at once."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from tarflowlm.cli.arguments import SampleArgs
from tarflowlm.cli.prompts import Wording, not_utf8
from tarflowlm.config import checked_seed
from tarflowlm.device import threads_for
from tarflowlm.errors import UserError
from tarflowlm.generation import Watch, generate
from tarflowlm.generation.sampling import adjust_weights
from tarflowlm.language_model import LanguageModel
from tarflowlm.terminal.streams import TextStream, write_out
from tarflowlm.terminal.tables import print_notice

HELP = """\
TEXT              continue this text
(an empty line)   go on with the text so far
/again            write the last continuation anew
/temperature 0.7  likewise /top-k 20, /top-p 0.9; without a number these two are off
/length 200       tokens to write
/stop TEXT        stop before this text, too; without a text, nowhere
/seed 3           start the random numbers anew
/quit             or Ctrl-D; Ctrl-C stops the writing"""
NUMBERS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top-k": int,
    "top-p": float,
    "length": int,
    "seed": int,
}
OPTIONAL = ("top-k", "top-p")


def converse(model: LanguageModel, wording: Wording, args: SampleArgs) -> None:
    """Read and continue prompts until the input ends, or Ctrl-C is pressed while nothing is written.

    Mistakes cost a line each. Where nobody was there to see them, they also cost the exit status 2 at the end.
    """
    session = _Session(model, wording, args)
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        with suppress(ImportError):
            import readline  # noqa: F401  (it lets `input` edit and repeat lines)
        print_notice(session.console, "Type a text to continue; an empty line goes on; /help lists the commands.")
    line, status = args.prompt, 0
    while True:
        try:
            line = input("> " if asks else "") if line is None else line
            if line.strip() == "/quit":
                break
            session.obey(line)
        except (EOFError, KeyboardInterrupt):
            if asks:
                write_out("\n")
            break
        except UnicodeDecodeError as error:
            raise not_utf8(error) from None
        except UserError as error:
            session.console.print(f"tarflowlm: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
            status = 0 if sys.stdin.isatty() else 2
        line = None
    if status:
        sys.exit(status)


class _Stopped(Exception):
    """The text has come to a stop."""


class _Session:
    """The settings, and the text so far."""

    def __init__(self, model: LanguageModel, wording: Wording, args: SampleArgs) -> None:
        self.model, self.wording, self.tokenizer = model, wording, wording.tokenizer
        self.console = Console(stderr=True)
        length = max(model.config.context // 2, 1) if args.length is None else args.length
        self.args = self._checked(replace(args, length=length))
        self.stops = tuple(map(wording.stop, args.stop))
        self.generator = torch.Generator().manual_seed(args.seed)
        self.tokens = self.last = torch.zeros(0, dtype=torch.long)
        """The text so far, and how it was before the last continuation."""

    def obey(self, line: str) -> None:
        """A line from the user: a text to continue, or a command. UserError if it makes no sense."""
        if not line.startswith("/"):
            if line:
                self.tokens = self.wording.prompt(line)
                self.wording.say(partial(print_notice, self.console))
                Console().print(Text(self.tokenizer.decode(self.tokens)), style="bold", end="", soft_wrap=True)
            self._write()
            return
        name, _, value = line[1:].partition(" ")
        if name == "help":
            write_out(f"{HELP}\n")
        elif name == "again":
            self.tokens = self.last
            self._write()
        elif name == "stop":
            self.stops = (*self.stops, self.wording.stop(value)) if value else ()
            print_notice(self.console, f"stops: {', '.join(map(repr, self.stops)) or 'none'}")
        elif name in NUMBERS:
            self._set(name, value.strip())
        else:
            raise UserError(f"/{name}: no such command; /help lists them")

    def _set(self, name: str, value: str) -> None:
        try:
            number = None if not value and name in OPTIONAL else NUMBERS[name](value)
        except ValueError:
            raise UserError(f"{name} {value!r}: give a number, as in /help") from None
        changed: dict[str, Any] = {name.replace("-", "_"): number}
        self.args = self._checked(replace(self.args, **changed))
        if name == "seed":
            self.generator.manual_seed(self.args.seed)
        print_notice(self.console, f"{name} {'off' if number is None else number}")

    def _checked(self, args: SampleArgs) -> SampleArgs:
        adjust_weights(args.temperature, args.top_k, args.top_p)
        checked_seed(args.seed)
        if args.length is not None and args.length < 1:
            raise UserError(f"length {args.length}: must be at least 1")
        return args

    def _write(self) -> None:
        """Continue the text, shown as it comes; Ctrl-C keeps what there is."""
        prompt, told, args = self.tokens, list[Tensor](), self.args
        self.last = prompt
        text = self.tokenizer.decode(prompt)
        stream = TextStream(write_out, self.tokenizer, self.stops, start=len(text), shown=len(text))
        assert args.length is not None

        def on_tokens(tokens: Tensor) -> None:
            told.append(tokens[0])
            stream.add(tokens[0])
            if stream.has_stopped:
                raise _Stopped

        try:
            with suppress(_Stopped, KeyboardInterrupt), threads_for(args.particles):
                generate(
                    self.model,
                    num_tokens=len(prompt) + args.length,
                    prompt=prompt if len(prompt) else None,
                    generator=self.generator,
                    decoder=args.decoder,
                    watch=Watch(on_tokens=on_tokens),
                    **args.writing(),
                )
        finally:
            text = stream.close()
            write_out("\n")
        if stream.has_stopped:
            self.tokens = torch.from_numpy(self.tokenizer.encode(text))
        elif told:
            self.tokens = torch.cat(told)
