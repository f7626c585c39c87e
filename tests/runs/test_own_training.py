"""A tokenizer, an optimiser and a schedule of one's own, each of a file outside the package, and a
model of one's own: no change of the package.
"""

import json
import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

import tarflowlm
from helpers import FLOW, metrics_of, tiny_flow
from tarflowlm.config import OPTIMIZERS, SCHEDULES, TOKENIZERS, DataConfig, OptimConfig
from tarflowlm.config import TokenizerConfig as HowTokens
from tarflowlm.data import Tokenizer, load_tokenizer, prepare_corpus
from tarflowlm.errors import UserError
from tarflowlm.model import TarFlowLM
from tarflowlm.training.optim import build_optimizers, schedule

OWN = '''
from collections import Counter

import numpy as np
import torch

import tarflowlm
from tarflowlm.data import Tokenizer


@tarflowlm.tokenizer("word")
class Words(Tokenizer):
    """The most frequent words, and <unk> for all others."""

    is_lossless = False

    def __init__(self, words):
        self.words = words
        self.token_bytes = [f"{word} ".encode() for word in words]
        self.ids = {word: index for index, word in enumerate(words)}

    @classmethod
    def train(cls, texts, config):
        counts = Counter(word for text in texts for word in text.split())
        return cls(["<unk>", *(word for word, _ in counts.most_common(config.vocab_size - 1))])

    def encode_each(self, texts):
        return np.array([self.ids.get(w, 0) for text in texts for w in text.split()], np.int64)

    def settings(self):
        return {"words": self.words}


@tarflowlm.optimizer("sgd")
def sgd(config, parameters):
    return torch.optim.SGD(parameters.values(), lr=config.lr, momentum=0.9)


@tarflowlm.schedule("halved")
def halved(config, step, num_steps):
    return 1.0 if step < num_steps / 2 else 0.5
'''
SMALL = {
    "data.tokenizer.kind": "word",
    "data.tokenizer.vocab_size": 12,
    "optim.optimizer": "sgd",
    "optim.schedule": "halved",
    "optim.lr": 0.01,
    "model.context": 16,
    "model.trunk.width": 8,
    "train.batch_size": 2,
    "train.evaluate_windows": 2,
    "train.test_windows": 2,
    "train.log_every": 1,
    "train.keep_idle": True,
}


@pytest.fixture
def own(tmp_path, monkeypatch, forget):
    """The module my_training."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_training.py").write_text(OWN, encoding="utf-8")
    return import_module("my_training")


@pytest.mark.slow
def test_a_run_of_ones_own_parts_is_trained_shown_and_used(
    tmp_path, corpus_file, own, forget, run, run_json, refused
):
    folder = tmp_path / "run"
    lm = tarflowlm.train("mini-mixd", folder, data=corpus_file, steps=4, device="cpu", **SMALL)
    assert type(lm.tokenizer).__name__ == "Words"
    words = "the king of the land"
    assert len(lm.encode(words)) == len(words.split())
    assert lm.score(words).total > 0
    assert np.isnan(lm.score(words).bits_per_character)
    assert isinstance(lm.write(length=6), str)
    # no bits per character, and the rates of the schedule
    lines = [line for line in metrics_of(folder) if line["split"] == "train"]
    assert {line["bpc"] for line in lines} == {None}
    assert [line["lr"] for line in lines][-2:] == [0.01, 0.01]  # a stage of one step each
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["test"]["bpc"] is None
    assert "keep no characters" in run("eval", folder).out
    assert run_json("eval", folder)["bpc"] is None
    (row,) = run_json("runs", folder)["runs"]
    assert (row["state"], row["bpc"]) == ("finished", None)
    with_them = run_json("info", folder)
    forget()
    assert run_json("info", folder) == with_them
    refused("sample", folder, names=["tokenizer 'word' of your module my_training", "--import"])
    with pytest.raises(UserError, match=r"tokenizer 'word' of your module my_training: import"):
        load_tokenizer(folder)
    import_module("my_training")
    assert tarflowlm.load(folder).tokenizer.token_bytes == lm.tokenizer.token_bytes
    saved = lm.save_pretrained(tmp_path / "saved")
    assert tarflowlm.load(saved).score(words).total == pytest.approx(lm.score(words).total)


def test_help_lists_names_of_ones_own(own, run, refused):
    page = " ".join(run("train", "mini-mixd", "--help").out.split())
    own = ("{char,byte,bpe,word}", "{adamw,muon,sgd}", "{wsd,halved}")
    ours = ("{gpt,qwen3", "coupling {affine,token-affine,mix1,mixd")
    assert all(names in page for names in (*own, *ours))
    said = ["optim.optimizer 'sdg'", "did you mean sgd?", "adamw, muon", "--import MODULE"]
    refused("train", "mini-mixd", "--out", "x", "--optim.optimizer", "sdg", names=said)


def test_functions_are_given_in_python(own):
    assert OPTIMIZERS.name_of(own.sgd) == OPTIMIZERS.name_of("sgd") == "sgd"
    with pytest.raises(UserError, match=r"'SGD' has no name: write @tarflowlm.optimizer"):
        tarflowlm.train("mini-mixd", "x", optimizer=torch.optim.SGD)
    config = OptimConfig(optimizer="sgd", schedule="halved")
    model = torch.nn.Linear(2, 2)
    (made,) = build_optimizers(config, model)
    assert made.param_groups[0]["lr_scale"] == 1.0
    assert [schedule(config, step, 4) for step in range(4)] == [1.0, 1.0, 0.5, 0.5]
    OPTIMIZERS["sgd"] = lambda config, parameters: "no"
    with pytest.raises(UserError, match=r"optimizer 'sgd' 'no' .*: give a torch.optim.Optimizer"):
        build_optimizers(config, model)
    SCHEDULES["halved"] = lambda config, step, num_steps: -1.0
    with pytest.raises(UserError, match=r"schedule 'halved' -1.0: must be at least 0"):
        schedule(config, 0, 4)


class Letters(Tokenizer):
    """A tokenizer without a name."""

    kind = "letters"

    def __init__(self) -> None:
        self.token_bytes = [b"a", b"b"]

    def encode_each(self, texts):
        return np.array([min(ord(c) - 97, 1) for text in texts for c in text], np.int64)

    def settings(self):
        return {}


def test_a_tokenizer_that_cannot_be_read_back_is_refused_before_work(tmp_path, forget):
    text = tmp_path / "text.txt"
    text.write_text("abba" * 100, encoding="utf-8")
    made = DataConfig(source=str(text))
    model = tiny_flow(vocab_size=2).float()
    for refused in (
        lambda: prepare_corpus(made, Letters(), out=tmp_path / "corpus"),
        lambda: tarflowlm.Pretrained(model, Letters()),
    ):
        with pytest.raises(UserError, match=r"Letters has no name .*: write @tarflowlm.tokenizer"):
            refused()
    tarflowlm.tokenizer("letters")(Letters)
    assert prepare_corpus(made, Letters(), out=tmp_path / "corpus").num_characters("train") == 360
    text.write_text("abbac" * 100, encoding="utf-8")
    with pytest.raises(UserError, match=r"'letters' loses some of .*: set is_lossless = False"):
        prepare_corpus(made, Letters(), out=tmp_path / "another")
    for broken, problem in (
        ({"settings": lambda self: {"unknown": 1}}, "not made of its settings"),
        ({"settings": lambda self: {1, 2}}, "are no JSON"),
    ):
        kind = tarflowlm.tokenizer("letters")(type("Letters", (Letters,), dict(broken)))
        TOKENIZERS["letters"] = kind
        with pytest.raises(UserError, match=problem):
            prepare_corpus(made, kind(), out=tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_changed_tokenizer_prepares_its_text_again(tmp_path, forget, monkeypatch):
    # a file of the same second and size would be taken from Python's cache
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = tmp_path / "text.txt"
    text.write_text("abba" * 100, encoding="utf-8")

    def corpus_of(length: int) -> int:
        source = OWN.replace(
            "text.split()", f"[text[i:i + {length}] for i in range(0, len(text), {length})]"
        )
        (tmp_path / "my_training.py").write_text(source, encoding="utf-8")
        forget()
        import_module("my_training")
        how = HowTokens(kind="word", normalize="none", vocab_size=5)
        return prepare_corpus(DataConfig(source=str(text), tokenizer=how)).num_tokens("train")

    sys.path.insert(0, str(tmp_path))
    try:
        assert corpus_of(2) == 2 * corpus_of(4)
    finally:
        sys.path.remove(str(tmp_path))


@pytest.mark.slow
def test_training_begins_with_a_model_of_ones_own(tmp_path, corpus_file):
    config = replace(FLOW, vocab_size=27, context=16, blocks=FLOW.blocks[:1])
    model = TarFlowLM(config)
    model.codebook.requires_grad_(False)
    model.codebook.mean.data.copy_(torch.linspace(-9, 9, 27)[:, None].expand(-1, 3))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    options = {"train.batch_size": 2, "train.test_windows": 2, "train.evaluate_windows": 2}
    options["data.tokenizer.normalize"] = "text8"
    folder = tmp_path / "run"
    given = {"data": corpus_file, "steps": 3, "device": "cpu", "model": model}
    lm = tarflowlm.train("mini-mixd", folder, **given, **options)
    trained = lm.model.state_dict()
    assert torch.equal(trained["codebook.mean"], before["codebook.mean"])
    changed = [name for name in before if not torch.equal(trained[name], before[name])]
    assert any("transformer" in name for name in changed)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    # the same call, and a resumed run, know what it began with
    assert tarflowlm.train("mini-mixd", folder, **given, **options).info["step"] == "3"
    longer = tarflowlm.resume(folder, steps=5, device="cpu")
    assert torch.equal(longer.model.codebook.mean, before["codebook.mean"])
    with pytest.raises(UserError, match=r"model.context with a model: .* leave that out"):
        tarflowlm.train("mini-mixd", folder, **given, **{"model.context": 8})
