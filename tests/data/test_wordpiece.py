"""WordPiece as of bert-base-uncased, and the benchmark that papers read with it."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer

from tarflowlm.data import TokenizerConfig, build_tokenizer, load_tokenizer, prepare_corpus
from tarflowlm.data.prompts import BLANK, read, read_template
from tarflowlm.data.sources import sources_dir
from tarflowlm.data.splits import SPLITS, split_of_document
from tarflowlm.data.text import normalize_bert
from tarflowlm.data.tokenizer import BERT_NORMALIZER, WordPieceTokenizer
from tarflowlm.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = (
    *SPECIAL,
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    *".,'\"!?-$()/:;",
    *("the", "cat", "sat", "don", "##ing", "##ed", "\u00a3", "##\u00a3", "\u65e5"),
)


def theirs() -> tokenizers.Tokenizer:
    """A small tokenizer of the library's, of the form of bert-base-uncased's."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    library = tokenizers.Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    library.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = BertPreTokenizer()
    library.decoder = tokenizers.decoders.WordPiece()
    library.add_special_tokens(list(SPECIAL))
    return library


THEIRS = theirs()


@pytest.fixture
def config(tmp_path) -> TokenizerConfig:
    THEIRS.save(str(tmp_path / "bert.json"))
    source = str(tmp_path / "bert.json")
    return TokenizerConfig(kind="wordpiece", source=source, normalize="bert")


@pytest.fixture
def ours(config):
    return build_tokenizer(config)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    st.text(
        st.one_of(
            st.sampled_from("The cats don't, \u00c9 \u00a35 \u65e5\n"),
            st.characters(exclude_categories=["Cs"]),
        ),
        max_size=40,
    )
)
def test_tokens_are_the_library_s_and_known_texts_are_restored(text):
    ours = tokenizer_of(THEIRS)
    found = ours.prepare(text)
    assert normalize_bert(found) == found
    ids = ours.encode(found)
    expected = THEIRS.encode(text.replace("[", "("), add_special_tokens=False).ids
    assert ours.encode(ours.prepare(text.replace("[", "("))).tolist() == expected
    if WORDS.index("[UNK]") not in ids:
        assert ours.decode(ids) == found
        assert ours.characters_per_token[ids].sum() == len(found)


def tokenizer_of(library: tokenizers.Tokenizer):
    """Ours, of the same content."""
    return WordPieceTokenizer(json.loads(library.to_str()))


def test_it_is_kept_as_it_was(ours, tmp_path):
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.kind, again.normalization, again.end) == ("wordpiece", "bert", 3)
    assert again.fingerprint == ours.fingerprint
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "Caf\u00e9s don't SIT: 5"
    ids = library.encode(text, add_special_tokens=False).ids
    assert ids == ours.encode(ours.prepare(text)).tolist()


def test_prompts_and_templates_are_read_as_the_text_is(ours):
    prompt = read(ours, "The cat's ", goes_on=True)
    assert prompt.text == " the cat ' s "
    assert ours.decode(prompt.tokens) == " the cat ' s"
    template = read_template(ours, "The _, sat [...3] on.")
    assert [ours.decode([token]) for token in template.tokens if token != BLANK] == [
        *(" the", " ,", " sat"),
        *(" o", "n", " ."),
    ]
    gap = template.parts[3]
    assert gap.most == 3
    assert ours.token_bytes[gap.begins.nonzero()[0, 0]].startswith(b" ")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"kind": "wordpiece", "normalize": "bert"}, "source"),
        ({"kind": "wordpiece", "source": "bert-base-uncased"}, "normalize"),
        ({"kind": "bpe", "source": "gpt2", "normalize": "bert"}, "normalize"),
    ],
)
def test_contradictions_name_the_field(fields, name):
    with pytest.raises(UserError, match=name):
        TokenizerConfig(**fields)


@pytest.mark.parametrize(
    "changes",
    [{"normalizer": BERT_NORMALIZER | {"lowercase": False}}, {"added_tokens": []}],
    ids=["cased", "without [SEP]"],
)
def test_others_are_refused(changes, tmp_path):
    document = json.loads(THEIRS.to_str()) | changes
    (tmp_path / "cased.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"cased\.json is no tokenizer"):
        load_tokenizer(tmp_path / "cased.json")


# LM1B


@pytest.fixture
def sentences(private_places: None) -> dict[str, list[str]]:
    """Sentences as the benchmark has them, in files named as the hub's."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = sources_dir() / "lm1b" / "data"
    folder.mkdir(parents=True)
    texts = {
        "train": [f"The {n} cats sat , don 't they ? \u00a3 {n}" for n in range(3000)],
        "test": [f'" A cat {n} " sat .' for n in range(20)],
    }
    for name, rows in texts.items():
        parquet.write_table(
            pyarrow.table({"text": rows}), folder / f"{name}-00000-of-00001.parquet"
        )
    return texts


def test_sentences_are_whole_in_the_splits_of_the_benchmark(sentences, config, tmp_path):
    corpus = prepare_corpus("lm1b", config, tmp_path / "out")
    tokenizer = corpus.tokenizer
    found = {}
    for split in SPLITS:
        text = tokenizer.decode(np.asarray(corpus.split(split)))
        found[split] = text.removesuffix("\n\n").split("\n\n")
    assert found["test"] == [f' " a cat {n} " sat .' for n in range(20)]
    # a sentence is placed as the file has it
    is_valid = [split_of_document(s, (99.9, 100.0)) == "valid" for s in sentences["train"]]
    assert len(found["valid"]) == sum(is_valid) > 0
    assert len(found["train"]) + len(found["valid"]) == 3000
    assert found["train"][0] == " the 0 cats sat , don ' t they ? \u00a30"
