"""What users write for a model to continue or fill in, as its tokenizer takes it."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from tarflowlm.data import TEXT8_ALPHABET, Tokenizer
from tarflowlm.data.text import read_text
from tarflowlm.errors import UserError
from tarflowlm.generation.sampling import BLANK, encode_template, normalize_template


class Wording:
    """Turns prompts, templates and stops into what `tokenizer` knows.

    They are normalised on request. Upper case becomes lower case where the model knows no other.
    """

    def __init__(self, tokenizer: Tokenizer, *, normalize: bool) -> None:
        self.tokenizer, self.normalize = tokenizer, normalize
        self._known = set[str]()
        if tokenizer.kind == "char":
            self._known = set(tokenizer.symbols)
        elif tokenizer.normalization == "text8":
            self._known = set(TEXT8_ALPHABET)
        self._has_lowered = self._has_said = False

    def say(self, notice: Callable[[str], None]) -> None:
        """Tell `notice` once if upper case has become lower case."""
        if self._has_lowered and not self._has_said:
            self._has_said = True
            notice("this model knows no upper case: it gets the text in lower case")

    def prompt(self, text: str) -> Tensor:
        """Tokens [tokens]. UserError for an empty text and for unknown characters."""
        if not text:
            raise UserError("the prompt is empty: leave --prompt out to sample without one")
        text = self.tokenizer.prepare(text) if self.normalize else self._lowered(text)
        return torch.from_numpy(self.tokenizer.encode(text))

    def template(self, text: str, blank: str) -> Tensor:
        """Tokens [tokens], BLANK for every blank. UserError as `encode_template`, and for a text without blanks."""
        if self.normalize and len(blank) == 1:
            text = normalize_template(self.tokenizer, text, blank)
        else:
            text = self._lowered(text, blank)
        tokens = encode_template(self.tokenizer, text, blank)
        if not (tokens == BLANK).any():
            raise UserError(
                f"the template {text!r} has no blank: mark tokens to fill in by {blank!r}, or give it as --prompt"
            )
        return tokens

    def stop(self, text: str) -> str:
        """A text that the model can write. UserError for unknown characters."""
        text = self._lowered(text)
        self.tokenizer.encode(text)
        return text

    def _lowered(self, text: str, blank: str = "") -> str:
        known = self._known
        lowered = "".join(c.lower() if c != blank and c not in known and c.lower() in known else c for c in text)
        self._has_lowered |= lowered != text
        return lowered


def read_prompts(source: str) -> dict[int, str]:
    """The prompts in a file, or on standard input for "-": line number -> text, without the lines that are blank.

    UserError for what is not a text, and if no line is left.
    """
    if source == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text ({error.reason}): convert it") from None
    else:
        text = read_text(source)
    lines = {number: line.removesuffix("\r") for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise UserError(f"prompts {source}: holds no prompt; write one a line")
    return lines
