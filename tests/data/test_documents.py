"""Documents: each whole in one split, followed by its end, in another order in every epoch."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import encoded, prepared, suited_to
from tarflowlm.data import (
    CharTokenizer,
    TokenizerConfig,
    WindowSampler,
    load_tokenizer,
    open_corpus,
    windows,
)
from tarflowlm.data import encode as encode_module
from tarflowlm.data.library import SEPARATOR
from tarflowlm.data.splits import SPLITS
from tarflowlm.errors import UserError

OPEN = TokenizerConfig(normalize="auto")
BYTES = TokenizerConfig(kind="byte", normalize="none")
LETTERS = TokenizerConfig()
WORDS = TokenizerConfig(kind="bpe", vocab_size=270, normalize="none")
TEXTS = [f"Story {n}:\nonce \u00e9 {'upon a time ' * (n % 5)}\u2014 the end" for n in range(60)]


@pytest.fixture(params=["folder", "jsonl"])
def source(request, tmp_path) -> str:
    """The TEXTS as a folder, or as the lines of a file, some with line ends of Windows."""
    if request.param == "folder":
        (tmp_path / "in").mkdir()
        for number, text in enumerate(TEXTS):
            file = tmp_path / "in" / f"{number}.txt"
            file.write_bytes(text.replace("\n", "\r\n").encode())
        (tmp_path / "in" / "empty.txt").touch()
        return str(tmp_path / "in")
    rows = [json.dumps({"text": text.replace("\n", "\r\n")}) for text in [*TEXTS, ""]]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    return str(tmp_path / "in.jsonl")


def documents_of(tokens, tokenizer) -> list[str]:
    """The documents of a shard, which ends with an end."""
    ids = np.asarray(tokens)
    *found, last = np.split(ids, np.flatnonzero(ids == tokenizer.end) + 1)
    assert not len(last)
    return [tokenizer.decode(piece[:-1]) for piece in found]


@pytest.mark.parametrize("config", [BYTES, WORDS, OPEN], ids=["byte", "bpe", "characters"])
def test_every_document_is_whole_in_one_split_and_ends(source, config, tmp_path):
    corpus = prepared(source, suited_to(source, config), tmp_path / "out")
    tokenizer = corpus.tokenizer
    assert tokenizer.end == tokenizer.vocab_size - 1
    found = {split: documents_of(corpus.split(split), tokenizer) for split in SPLITS}
    assert sorted(text for texts in found.values() for text in texts) == sorted(TEXTS)
    assert [len(found[split]) for split in SPLITS] == [54, 3, 3]
    for split, texts in found.items():
        assert corpus.num_characters(split) == sum(map(len, texts))
        ids = np.asarray(corpus.split(split))
        assert tokenizer.characters_per_token[ids].sum() == sum(map(len, texts))
        assert tokenizer.bytes_per_token[ids].sum() == len("".join(texts).encode())
    again = load_tokenizer(tmp_path / "out")
    assert (again.end, again.fingerprint) == (tokenizer.end, tokenizer.fingerprint)
    whole = encoded(source, tokenizer, "all")
    assert sorted(documents_of(whole, tokenizer)) == sorted(TEXTS)


def test_letters_have_no_end_and_documents_are_not_cut(source, tmp_path):
    corpus = prepared(source, LETTERS, tmp_path / "out")
    tokenizer = corpus.tokenizer
    assert (tokenizer.end, tokenizer.vocab_size) == (None, 27)
    for split in SPLITS:
        text = tokenizer.decode(np.asarray(corpus.split(split)))
        assert text.startswith(" story ")
        assert text.endswith(" the end")


@pytest.mark.parametrize("count", [3, 4, 7, 50])
@pytest.mark.parametrize("start", range(5))
def test_no_split_of_few_documents_is_empty(count, start, tmp_path):
    file = tmp_path / "few.jsonl"
    rows = [json.dumps({"text": f"text {start} {number}"}) for number in range(count)]
    file.write_text("\n".join(rows))
    corpus = prepared(str(file), BYTES, tmp_path / "out")
    sizes = [len(documents_of(corpus.split(split), corpus.tokenizer)) for split in SPLITS]
    assert sum(sizes) == count
    assert min(sizes) >= 1


def test_two_documents_are_too_few(tmp_path):
    file = tmp_path / "two.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "two"}')
    with pytest.raises(UserError, match="more different documents"):
        prepared(str(file), BYTES, tmp_path / "out")
    tokens = encoded(str(file), prepare(tmp_path).tokenizer, "all")
    assert len(tokens) == 3 * 4


def prepare(folder: Path):
    """A small corpus of documents in bytes."""
    file = folder / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return prepared(str(file), BYTES, folder / "corpus")


def test_all_of_a_plain_text_is_whole(tmp_path, monkeypatch):
    """Also for a tokenizer that ends documents, of which the text is none."""
    monkeypatch.setattr(encode_module, "BLOCK", 100)
    tokenizer = prepare(tmp_path).tokenizer
    file = tmp_path / "a #1.txt"
    file.write_text("".join(f"word{n} " for n in range(500)))
    found = encoded(str(file), tokenizer, "all")
    assert tokenizer.decode(np.asarray(found)) == file.read_text()


def test_the_name_of_the_end_in_a_text_is_text(tmp_path):
    tokenizer = prepare(tmp_path).tokenizer
    text = f"a{SEPARATOR}b"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.end not in tokenizer.encode(text)
    assert tokenizer.decode([97, tokenizer.end, 98]) == "a\n\nb"
    assert open_corpus(tmp_path / "corpus").tokenizer.end == tokenizer.end


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_the_characters_of_any_text_round_trip(text):
    alphabet = "".join(sorted(set(text + "ab")))
    tokenizer = CharTokenizer(alphabet, "none", has_end=True)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.characters_per_token[tokenizer.encode(text)].sum() == len(text)


# windows

END = 0
LENGTHS = [1, 5, 2, 30, 9, 9, 1, 14, 3, 7, 21, 4]


def text_of(lengths: list[int]) -> np.ndarray:
    """Documents of different tokens, each with its end."""
    rest = iter(range(1, 10_000))
    return np.array([x for n in lengths for x in [*(next(rest) for _ in range(n)), END]])


TOKENS = text_of(LENGTHS)
FIRST = {1, *(TOKENS[np.flatnonzero(TOKENS == END)[:-1] + 1].tolist())}


def sampler(**changes) -> WindowSampler:
    return WindowSampler(TOKENS, **({"window": 10, "batch": 2, "seed": 3, "end": END} | changes))


def draw(source: WindowSampler, count: int) -> torch.Tensor:
    return torch.stack([source.next() for _ in range(count)])


def test_an_epoch_sees_every_document_once_but_for_an_incomplete_window():
    source = sampler(batch=1)
    seen: dict[int, list[int]] = {}
    while source.epoch < 20:
        window = source.next().flatten().tolist()
        seen.setdefault(source.epoch, []).extend(window)
        # what begins a document stands behind an end
        for before, token in pairwise(window):
            assert token == END or (before == END) == (token in FIRST)
    del seen[20]
    for tokens in seen.values():
        inner = [token for token in tokens if token != END]
        assert len(set(inner)) == len(inner)
        assert len(tokens) > len(TOKENS) - 2 * 10
    # neighbours differ from epoch to epoch
    assert len({tuple(tokens) for tokens in seen.values()}) == 20


@pytest.mark.parametrize("steps", [0, 3, 5, 6, 17])
def test_resuming_equals_never_stopping(steps):
    whole = sampler()
    for _ in range(steps):
        whole.next()
    resumed = sampler()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert torch.equal(draw(resumed, 30), draw(whole, 30))
    assert not torch.equal(draw(sampler(seed=4), 30), draw(sampler(), 30))


def test_ranks_share_out_the_global_batch():
    whole = draw(sampler(batch=6), 30)
    ranks = [draw(sampler(batch=2, rank=rank, world=3), 30) for rank in range(3)]
    assert torch.equal(torch.cat(ranks, dim=1), whole)


def test_a_large_text_keeps_its_order(monkeypatch):
    monkeypatch.setattr(windows, "SHUFFLED", 1)
    assert torch.equal(draw(sampler(), 9), draw(sampler(end=None), 9))
