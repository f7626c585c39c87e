"""Text normalisation: the TEXT8 alphabet of 27 characters (`a`-`z` and single spaces)."""

from typing import Literal, get_args

import numpy as np

Normalization = Literal["none", "text8"]
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)

TEXT8_ALPHABET = " abcdefghijklmnopqrstuvwxyz"

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _byte_table() -> bytes:
    table = bytearray(b" " * 256)
    for code in range(ord("a"), ord("z") + 1):
        table[code] = code
        table[code - 32] = code
    for code in range(ord("0"), ord("9") + 1):
        table[code] = code
    return bytes(table)


_TABLE = _byte_table()


def normalize_text8(text: str) -> str:
    """Text in the TEXT8 alphabet, as `wikifil.pl` writes it (Mahoney 2006).

    ASCII upper case becomes lower case, each digit its English name between spaces, everything else that is
    not `a`-`z` (non-ASCII letters too) a space, runs of spaces one space. `<|endoftext|>` separators count
    as a space. The result begins with one space and has none at its end; text without letters or digits
    gives `" "`. Idempotent. Works on UTF-8 bytes: every byte of a non-ASCII character becomes a space, and
    runs collapse.
    """
    # errors="replace": a lone surrogate has no UTF-8 form; its "?" becomes a space like any other symbol
    data = text.encode("utf-8", errors="replace").replace(b"<|endoftext|>", b" ").translate(_TABLE)
    for digit, name in enumerate(_DIGITS):
        data = data.replace(str(digit).encode(), f" {name} ".encode())
    codes = np.frombuffer(b" " + data, dtype=np.uint8)
    is_letter = codes != ord(" ")
    if not is_letter.any():
        return " "
    keep = is_letter.copy()
    keep[:-1] |= is_letter[1:]  # of a run of spaces the last one stays, if a letter follows
    return codes[keep].tobytes().decode("ascii")


def normalize(text: str, how: Normalization) -> str:
    """`text` itself for `"none"`, `normalize_text8(text)` for `"text8"`."""
    return normalize_text8(text) if how == "text8" else text
