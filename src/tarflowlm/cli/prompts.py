"""What users write for a model to continue, fill in, edit or score, as its tokenizer takes it."""

import re
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from tarflowlm.config import Normalization
from tarflowlm.data import Tokenizer
from tarflowlm.data.text import read_text
from tarflowlm.errors import UserError
from tarflowlm.generation.sampling import BLANK, encode_prompt, encode_template, normalize_template


class Wording:
    """Turns texts, prompts, templates and stops into what the tokenizer of a model knows.

    They are normalised on request. Upper case becomes lower case where the model knows no other.
    """

    def __init__(self, tokenizer: Tokenizer, normalization: Normalization | None, *, is_file: bool = False) -> None:
        """`normalization` is that of --normalize. A file is normalised in any case, as the training text was."""
        self.tokenizer = tokenizer.with_normalization(normalization)
        self.normalizes = is_file or normalization is not None
        self._has_lowered = self._has_said = False

    def say(self, notice: Callable[[str], None], model: str = "this model") -> None:
        """Tell `notice` once if upper case has become lower case."""
        if self._has_lowered and not self._has_said:
            self._has_said = True
            notice(f"{model} knows no upper case: it gets the text in lower case")

    def text(self, text: str, name: str) -> str:
        """`text` as the model knows it. UserError, calling it `name`, for one that is empty or not UTF-8."""
        _check_utf8(text, name)
        text = self.tokenizer.prepare(text) if self.normalizes else self._lowered(text)
        if not text:
            raise UserError(f"the {name} is empty: give at least one character")
        return text

    def tokens(self, text: str, name: str) -> Tensor:
        """Tokens [tokens]. UserError for an empty text, which it calls `name`, and for unknown characters."""
        return torch.from_numpy(self.tokenizer.encode(self.text(text, name)))

    def piece(self, text: str, name: str) -> str:
        """As `text`, for a piece of another one: without the spaces that normalisation leaves around it."""
        found = self.text(text, name)
        return found.strip() if self.normalizes else found

    def prompt(self, text: str) -> Tensor:
        """Tokens [tokens] of a text to continue. UserError as in `tokens`."""
        if not text:
            raise UserError("the prompt is empty: leave --prompt out to sample without one")
        return encode_prompt(self.tokenizer, self.text(text, "prompt"))

    def template(self, text: str, blank: str) -> Tensor:
        """Tokens [tokens], BLANK for every blank.

        UserError as `encode_template`, and for a text that has no blanks or is not UTF-8.
        """
        _check_utf8(text, "template")
        if len(blank) == 1:
            if self.normalizes:
                text = normalize_template(self.tokenizer, text, blank)
            else:
                text = blank.join(map(self._lowered, text.split(blank)))
        tokens = encode_template(self.tokenizer, text, blank)
        if not (tokens == BLANK).any():
            raise UserError(
                f"the template {text!r} has no blank: mark tokens to fill in by {blank!r}, or give it as --prompt"
            )
        return tokens

    def stop(self, text: str) -> str:
        """A text that the model can write. UserError for unknown characters, and for what is not UTF-8."""
        _check_utf8(text, "stop")
        # what normalisation leaves nothing of, a space for instance, is meant as it stands
        text = (self.tokenizer.prepare(text).strip() if self.normalizes else "") or self._lowered(text)
        self.tokenizer.encode(text)
        return text

    def _lowered(self, text: str) -> str:
        lowered = self.tokenizer.in_known_case(text)
        self._has_lowered |= lowered != text
        return lowered


def _check_utf8(text: str, name: str) -> None:
    """UserError if `text` holds bytes that Python could not decode, and kept as surrogates (PEP 383)."""
    if (found := re.search("[\udc80-\udcff]", text)) is not None:
        raise UserError(
            f"the {name} is not UTF-8 (character {found.start()} is byte 0x{ord(found[0]) - 0xDC00:02x}): "
            f"convert it to UTF-8"
        )


def not_utf8(error: UnicodeDecodeError) -> UserError:
    """What to say of standard input that is no text."""
    return UserError(f"standard input is not UTF-8 text ({error.reason}): convert it to UTF-8")


def read_source(source: str) -> str:
    """The text of a file, or of standard input for "-". UserError if there is none, or it is not UTF-8."""
    if source != "-":
        return read_text(source)
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error) from None


def read_prompts(source: str) -> dict[int, str]:
    """The prompts in a file, or on standard input for "-": line number -> text, without the lines that are blank.

    UserError for what is not a text, and if no line is left.
    """
    text = read_source(source)
    lines = {number: line.removesuffix("\r") for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise UserError(f"prompts {source}: holds no prompt; write one a line")
    return lines
