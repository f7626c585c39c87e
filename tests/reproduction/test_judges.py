"""Judges: a tiny GPT-2 made here stands for the hub's, and a tiny baseline for ours."""

import json
import math
from pathlib import Path

import pytest
import torch

from helpers import save_run, tiny_ar, tiny_flow
from reproduction.judges import load_judge
from tarflowlm.data import CharTokenizer
from tarflowlm.errors import UserError

TOKENIZER = CharTokenizer(" abcde", "none")
TEXTS = ["bad cab dad", " a bee", "e", "abcde " * 30]


@pytest.fixture(scope="module")
def baseline_run(tmp_path_factory) -> Path:
    return save_run(
        tmp_path_factory.mktemp("judges") / "ar",
        tiny_ar(vocab_size=6, context=12),
        tokenizer=TOKENIZER,
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A randomly initialised GPT-2 of 32 positions with a byte-level tokenizer trained on a few
    words.
    """
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("judges") / "gpt2"
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 280, "special_tokens": ["<|endoftext|>"], "show_progress": False}
    trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    library.train_from_iterator(TEXTS * 5, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 280, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, initializer_range=0.3)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_perplexity_equals_the_model_loss(gpt2):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    texts, nats, count = TEXTS[:2], 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        nats, count = nats + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    reading = load_judge(str(gpt2)).read(texts)
    assert reading.tokens == count
    assert reading.nats == pytest.approx(nats, rel=1e-5)
    assert reading.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)


@pytest.mark.slow
def test_features_equal_those_of_mauve_text(gpt2):
    utils = pytest.importorskip("mauve.utils")
    import transformers

    model = transformers.AutoModel.from_pretrained(gpt2).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    tokens = [
        tokenizer.encode(text, return_tensors="pt", truncation=True, max_length=32)
        for text in TEXTS
    ]
    expected = utils.featurize_tokens_from_model(model, tokens, batch_size=1)
    torch.testing.assert_close(
        load_judge(str(gpt2)).read(TEXTS).features, expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_pickled_weights_are_refused(gpt2, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((gpt2 / name).read_bytes())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the judge"):
        load_judge(str(tmp_path))


def test_baseline_scores_every_token(baseline_run):
    judge = load_judge(str(baseline_run))
    tokens = torch.from_numpy(TOKENIZER.encode("bad cab dad"))[None]
    reading = judge.read(["bad cab dad"])
    assert (reading.tokens, judge.source) == (11, "tales")
    assert reading.nats == pytest.approx(-judge.model.log_prob(tokens).item(), rel=1e-5)


def test_features_of_a_baseline_are_those_of_sampling(baseline_run):
    judge = load_judge(str(baseline_run))
    model = judge.model
    cache = model.allocate_cache(1, 12)
    with torch.no_grad():
        features = model.features_at(cache, None)
        for token in TOKENIZER.encode("bad cab"):
            features = model.features_at(cache, torch.tensor([[token]]))
    torch.testing.assert_close(judge.read(["bad cab"]).features, features, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[pytest.param("gpt2", marks=pytest.mark.slow), "baseline_run"])
def judge(request):
    return load_judge(str(request.getfixturevalue(request.param)))


def test_texts_do_not_influence_each_other(judge):
    together = judge.read(TEXTS)
    alone = [judge.read([text]) for text in TEXTS]
    assert together.nats == pytest.approx(sum(reading.nats for reading in alone), rel=1e-5)
    assert together.tokens == sum(reading.tokens for reading in alone)
    features = torch.cat([reading.features for reading in alone])
    torch.testing.assert_close(together.features, features, rtol=1e-4, atol=1e-5)


def test_what_comes_before_is_read_and_not_scored(judge):
    start, rest = "bad cab", [" dad", " cab dad bad" * 20]
    assert len(judge.encode(start + rest[1])) > judge.context
    found = judge.read(rest, before=[start] * 2)
    whole, before = (judge.read(texts) for texts in ([start + text for text in rest], [start] * 2))
    torch.testing.assert_close(found.by_text, whole.by_text - before.by_text, rtol=1e-5, atol=1e-4)
    assert found.tokens == whole.tokens - before.tokens
    assert judge.read(rest, before=["", ""]).nats == judge.read(rest).nats


def test_chunks_begin_afresh(judge):
    ids = list(judge.encode(TEXTS[3] * 3))
    assert len(ids) > 2 * judge.context
    chunks = [ids[start : start + judge.context] for start in range(0, len(ids), judge.context)]
    losses = [judge.score(torch.tensor([chunk]))[0] for chunk in chunks]
    reading = judge.read([TEXTS[3] * 3])
    assert reading.nats == pytest.approx(torch.cat(losses, dim=1).nansum().item(), rel=1e-5)


def refused(name: object, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_judge(str(name))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_missing_judges(tmp_path):
    refused(tmp_path / "missing", "missing", "no directory")
    refused("./missing", "./missing")
    refused("", "no directory")
    refused(tmp_path, "config.json")


@pytest.mark.slow
def test_judges_that_the_hub_does_not_give(monkeypatch):
    pytest.importorskip("transformers")

    def offline(name, **_):
        raise ConnectionError("offline: no hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused("no-one/no-such-model", "'no-one/no-such-model'", "offline: no hub", "baseline")
    refused("x" * 5000, "xxx")


@pytest.mark.slow
def test_models_that_cannot_judge(tmp_path, gpt2):
    refused(
        save_run(tmp_path / "flow", tiny_flow(vocab_size=27, couplings=("mixd",))),
        "flow",
        "mini-ar",
    )
    refused(save_run(tmp_path / "two", tiny_ar(vocab_size=27, patch=2)), "several tokens at once")
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    refused(encoder, "encoder", "cannot load the judge")
