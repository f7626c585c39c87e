"""Texts as tokens: tokenizers, prepared corpora, and windows for training and evaluation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tarflowlm.config import TEXT8_ALPHABET
from tarflowlm.data.bpe import BPETokenizer
from tarflowlm.data.corpus import Corpus, open_corpus
from tarflowlm.data.load import DataConfig, cached_corpus, check_source, encode_text_source
from tarflowlm.data.prepare import prepare_corpus
from tarflowlm.data.shards import TokenArray
from tarflowlm.data.sources import SOURCE_NAMES
from tarflowlm.data.stream import CorpusProgress
from tarflowlm.data.text import normalize_text8, read_text
from tarflowlm.data.tokenization import TokenizerConfig, build_tokenizer
from tarflowlm.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from tarflowlm.data.windows import WindowSampler, eval_windows, sliding_windows

__all__ = [
    "SOURCE_NAMES",
    "TEXT8_ALPHABET",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "CorpusProgress",
    "DataConfig",
    "TokenArray",
    "Tokenizer",
    "TokenizerConfig",
    "WindowSampler",
    "build_tokenizer",
    "cached_corpus",
    "check_source",
    "encode_text_source",
    "eval_windows",
    "load_tokenizer",
    "normalize_text8",
    "open_corpus",
    "prepare_corpus",
    "read_text",
    "sliding_windows",
]


def __getattr__(name: str) -> Any:
    """The names of `windows`, imported on first use: it alone needs torch, and configurations are read without."""
    if name not in ("WindowSampler", "eval_windows", "sliding_windows"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.windows"), name)
