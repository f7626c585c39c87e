"""From a source to tokens: its pieces are encoded one by one, and its documents get their ends."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tarflowlm.data.library import PIECE
from tarflowlm.data.reading import BLOCK, text_pieces
from tarflowlm.data.source import Source
from tarflowlm.data.splits import SPLITS, Piece, Split
from tarflowlm.data.tokenizer import Tokenizer
from tarflowlm.data.windows import Array
from tarflowlm.errors import UserError
from tarflowlm.registry import own_module


def encoded(
    source: Source,
    tokenizer: Tokenizer,
    wanted: Sequence[Split] = SPLITS,
    *,
    is_whole: bool = False,
) -> Iterator[tuple[Split, Array, int]]:
    """The tokens of the `wanted` splits of a text in parts, with the number of their characters, 0
    under a tokenizer that loses some of them.

    Every piece is encoded on its own. The ends of documents are among the tokens. A text that
    `is_whole` may be cut elsewhere than between its splits, where word pieces may cross.
    """
    pieces = _separated(source, tokenizer)
    if is_whole and (tokenizer.end is None or not source.has_documents):
        texts = text_pieces((piece.text for piece in pieces), PIECE)
        pieces = (Piece("test", text) for text in texts)
    source.progress.stage(f"encoding {source.name}, characters", source.num_characters)
    for batch in _batches(pieces):
        split = batch[0].split
        lengths = [len(piece.text) for piece in batch]
        if split in wanted:
            parts = [piece.text for piece in batch]
            if not tokenizer.is_lossless:
                yield split, _lossy(batch, tokenizer), 0
                source.progress.advance(sum(lengths))
                continue
            ids = tokenizer.encode_each(parts)
            if own_module(type(tokenizer)) and tokenizer.decode(ids) != "".join(parts):
                what = f"tokenizer {tokenizer.kind!r} loses some of {source.name}"
                raise UserError(f"{what}: set is_lossless = False in its class")
            if tokenizer.end is not None:
                # before the first token that begins a character of the next document
                reached = tokenizer.characters_per_token[ids].cumsum()
                ends = np.cumsum(lengths)[[piece.ends for piece in batch]]
                ids = np.insert(ids, np.searchsorted(reached, ends, side="right"), tokenizer.end)
            yield split, ids.astype(tokenizer.token_dtype), sum(lengths)
        source.progress.advance(sum(lengths))


def _lossy(batch: Iterable[Piece], tokenizer: Tokenizer) -> Array:
    """The tokens of pieces, one by one, under a tokenizer that does not keep their lengths."""
    parts = []
    for piece in batch:
        ends = [tokenizer.end] if piece.ends and tokenizer.end is not None else []
        parts += [tokenizer.encode_each([piece.text]), np.array(ends, dtype=np.int64)]
    return np.concatenate(parts).astype(tokenizer.token_dtype)


def _separated(source: Source, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The pieces of a text, with a separator between documents that no token ends, if the alphabet
    has it.
    """
    is_apart = tokenizer.end is not None or tokenizer.normalization == "text8"
    is_apart |= tokenizer.kind == "char" and not set(source.separator) <= set(tokenizer.alphabet)
    for piece in source.pieces():
        is_open = piece.ends and source.has_documents and not is_apart
        yield piece._replace(text=piece.text + source.separator) if is_open else piece


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces of each split in order, many short ones at a time, which are encoded faster."""
    waiting: dict[Split, list[Piece]] = {split: [] for split in SPLITS}
    size = dict.fromkeys(SPLITS, 0)
    for piece in pieces:
        split = piece.split
        waiting[split].append(piece)
        size[split] += len(piece.text)
        if size[split] >= BLOCK:
            yield waiting[split]
            waiting[split] = []
            size[split] = 0
    yield from filter(None, waiting.values())
