"""Texts as tokens: tokenizers, prepared corpora, and windows for training and evaluation."""

from tarflowlm.config import TEXT8_ALPHABET, DataConfig, TokenizerConfig
from tarflowlm.data.bpe import build_tokenizer
from tarflowlm.data.corpus import Corpus, encode_text, open_corpus, prepare_corpus
from tarflowlm.data.infer import infer_tokenizer, misfit
from tarflowlm.data.library import ByteTokenizer, CharTokenizer, load_tokenizer
from tarflowlm.data.normalize import normalize_text8
from tarflowlm.data.reading import read_text
from tarflowlm.data.sources import SOURCE_NAMES
from tarflowlm.data.tokenizer import Tokenizer
from tarflowlm.data.windows import WindowSampler, eval_windows, sliding_windows

__all__ = [
    "SOURCE_NAMES",
    "TEXT8_ALPHABET",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "DataConfig",
    "Tokenizer",
    "TokenizerConfig",
    "WindowSampler",
    "build_tokenizer",
    "encode_text",
    "eval_windows",
    "infer_tokenizer",
    "load_tokenizer",
    "misfit",
    "normalize_text8",
    "open_corpus",
    "prepare_corpus",
    "read_text",
    "sliding_windows",
]
