"""Contradictions in TokenizerConfig are caught and name the field."""

import pytest

from tarflowlm.data import TokenizerConfig, build_tokenizer
from tarflowlm.errors import UserError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alphabet": ""}, "alphabet='' must hold at least two"),
        ({"alphabet": "aa", "normalize": "none"}, "alphabet holds 'a' more than once"),
        ({"alphabet": "a\ud800", "normalize": "none"}, "alphabet holds half of a surrogate pair"),
        ({"alphabet": "abc"}, "alphabet lacks"),
        ({"vocab_size": 27}, "vocab_size=27 has no effect with kind='char'"),
        ({"source": "gpt2"}, "source='gpt2' has no effect with kind='char'"),
        ({"kind": "byte", "alphabet": "ab"}, "alphabet='ab' has no effect"),
        ({"kind": "byte", "vocab_size": 256}, "vocab_size=256 has no effect"),
        ({"kind": "bpe"}, "vocab_size=0 is too small for a BPE trained here: it needs 28"),
        ({"kind": "bpe", "vocab_size": 10**9}, "vocab_size=1000000000 is too large for a BPE"),
        ({"kind": "bpe", "vocab_size": 27}, "vocab_size=27 is too small"),
        ({"kind": "bpe", "vocab_size": 256, "normalize": "none"}, "it needs 257"),
        ({"kind": "bpe", "vocab_size": -1, "normalize": "none"}, "it needs 257"),
        ({"kind": "bpe", "vocab_size": 300, "normalize": "none", "alphabet": "ab"}, "no effect"),
        (
            {"kind": "bpe", "source": "gpt2", "vocab_size": 300},
            "vocab_size=300 has no effect with source='gpt2'",
        ),
        ({"kind": "bpe", "source": "gpt2", "alphabet": "ab"}, "alphabet='ab' has no effect"),
    ],
)
def test_contradictions(fields, message):
    with pytest.raises(UserError) as caught:
        TokenizerConfig(**fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"alphabet": "ab", "normalize": "none"},
        {"kind": "byte", "normalize": "none"},
        {"kind": "bpe", "vocab_size": 28},
        {"kind": "bpe", "vocab_size": 257, "normalize": "none"},
        {"kind": "bpe", "source": "gpt2", "normalize": "none"},
    ],
)
def test_sensible_choices(fields):
    config = TokenizerConfig(**fields)
    assert config.needs_training == (config.vocab_size > 0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "word", "kind='word' is not one of char, byte, bpe"),
        ("normalize", "nfc", "normalize='nfc' is not one of none, text8"),
    ],
)
def test_unknown_choices(field, value, message):
    config = TokenizerConfig()
    object.__setattr__(config, field, value)  # the constructor's types are checked in tests, but only there
    with pytest.raises(UserError, match=message):
        config.__post_init__()


def test_training_needs_text():
    with pytest.raises(UserError, match="needs training text"):
        build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=64))
