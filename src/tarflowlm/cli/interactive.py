"""`tarflowlm sample --interactive`: prompts from the terminal, each continued at once."""

import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from tarflowlm.checks import checked_seed
from tarflowlm.cli.options import not_utf8
from tarflowlm.cli.sample import Args
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import read
from tarflowlm.errors import UserError
from tarflowlm.generation import generate_steps
from tarflowlm.generation.sampling import adjust_weights
from tarflowlm.language_model import LanguageModel
from tarflowlm.terminal.bars import print_notice
from tarflowlm.terminal.texts import TextStream, write_out

HELP = """\
TEXT              continue this text
(an empty line)   go on with the text so far
/again            write the last continuation anew
/temperature 0.7  likewise /top-k 20, /top-p 0.9; without a number these two are off
/length 200       tokens to write
/stop TEXT        stop before this text, too; without a text, nowhere
/seed 3           start the random numbers anew
/quit             or Ctrl-D; Ctrl-C stops the writing"""
NUMBERS: dict[str, Any] = {
    "temperature": float,
    "top-k": int,
    "top-p": float,
    "length": int,
    "seed": int,
}


def converse(model: LanguageModel, tokenizer: Tokenizer, args: Args) -> None:
    """Read and continue prompts until the input ends, or Ctrl-C is pressed while nothing is
    written. A mistake costs one line, and from a pipe also the exit status 2 at the end.
    """
    session = _Session(model, tokenizer, args)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (it lets `input` edit and repeat lines)
        print_notice("Type a text to continue; an empty line goes on; /help lists the commands.")
    line, status = args.prompt, 0
    while True:
        try:
            line = input("> " if is_terminal else "") if line is None else line
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

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, args: Args) -> None:
        self.model, self.tokenizer = model, tokenizer
        length = max(model.config.context // 2, 1) if args.length is None else args.length
        self.args = self._checked(replace(args, length=length))
        self.stops = tuple(self._read(stop, "stop") for stop in args.stop)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.tokens = self.last = torch.zeros(
            0, dtype=torch.long
        )  # the text, and what it was one step ago

    def _read(self, text: str, name: str) -> str:
        return read(self.tokenizer, text, name=name, normalize=self.args.normalize).text

    def obey(self, line: str) -> None:
        """A line from the user: a text to continue, or a command."""
        name, _, value = line[1:].partition(" ")
        if not line.startswith("/"):
            if line:
                reading = read(
                    self.tokenizer, line, name="prompt", normalize=self.args.normalize, goes_on=True
                )
                self.tokens = reading.tokens
                if reading.notice:
                    print_notice(reading.notice)
                text = Text(self.tokenizer.decode(self.tokens.tolist()), style="bold")
                Console().print(text, end="", soft_wrap=True)
            self._write()
        elif name == "help":
            write_out(f"{HELP}\n")
        elif name == "again":
            self.tokens = self.last
            self._write()
        elif name == "stop":
            self.stops = (*self.stops, self._read(value, "stop")) if value else ()
            print_notice(f"stops: {', '.join(map(repr, self.stops)) or 'none'}")
        elif name in NUMBERS:
            self._set(name, value.strip())
        else:
            raise UserError(f"/{name}: no such command; /help lists them")

    def _set(self, name: str, value: str) -> None:
        try:
            number = None if not value and name in ("top-k", "top-p") else NUMBERS[name](value)
        except ValueError:
            raise UserError(f"{name} {value!r}: give a number, as in /help") from None
        changed: dict[str, Any] = {name.replace("-", "_"): number}
        self.args = self._checked(replace(self.args, **changed))
        if name == "seed":
            self.generator.manual_seed(self.args.seed)
        print_notice(f"{name} {'off' if number is None else number}")

    def _checked(self, args: Args) -> Args:
        assert args.temperature is not None
        adjust_weights(args.temperature, args.top_k, args.top_p)
        checked_seed(args.seed)
        return args

    def _write(self) -> None:
        """Continue the text, shown as it comes; Ctrl-C keeps what there is."""
        prompt, written, args = self.tokens, list[Tensor](), self.args
        self.last = prompt
        text = self.tokenizer.decode(prompt.tolist())
        stream = TextStream(write_out, self.tokenizer, self.stops, start=len(text), shown=len(text))
        assert args.length is not None

        steps = generate_steps(
            self.model,
            num_tokens=len(prompt) + args.length,
            prompt=prompt if len(prompt) else None,
            generator=self.generator,
            decoder=args.decoder,
            **args.writing(),
        )
        try:
            with suppress(KeyboardInterrupt):
                for tokens in steps:
                    written.append(tokens[0])
                    stream.add(tokens[0])
                    if stream.has_stopped:
                        break
        finally:
            text = stream.close()
            write_out("\n")
        if stream.has_stopped:
            self.tokens = torch.from_numpy(self.tokenizer.encode(text))
        elif written:
            self.tokens = torch.cat(written)
