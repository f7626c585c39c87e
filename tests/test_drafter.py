"""The drafter: its law against a plain computation, its limits, its file, and where it comes from.

Here a context is a tuple of tokens, and laws are averaged in dictionaries.
"""

from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch

from helpers import flip, save_run, tiny_ar, tiny_flow
from tarflowlm import drafts
from tarflowlm.config import DataConfig, RunConfig, TokenizerConfig, TrainConfig
from tarflowlm.drafts import LISTED, PRIOR, STEPS, Drafter, Guesser, drafter_of, make_drafter
from tarflowlm.errors import UserError
from tarflowlm.generation import generate
from tarflowlm.model import seeded
from tarflowlm.model_config import BaselineConfig, TransformerConfig
from tarflowlm.runs import DRAFT, SUMMARY, WEIGHTS
from tarflowlm.runs.checkpoint import (
    export,
    load_checkpoint,
    read_weights,
    write_drafter,
    write_weights,
)
from tarflowlm.training.stages import laws
from tarflowlm.training.train import train

K = 5


def texts_and_laws(windows=30, length=40, base=K, seed=0):
    """A text [W, T] in which most tokens repeat the one three before, and its laws [W, T, K]."""
    random = np.random.default_rng(seed)
    symbols = np.zeros((windows, length), dtype=np.int64)
    p = np.zeros((windows, length, base))
    for w in range(windows):
        for t in range(length):
            weights = np.full(base, 0.02)
            if t > 2:
                weights[symbols[w, t - 3]] += 1
            weights[(symbols[w, t - 1] + 1) % base if t else 0] += 0.3
            weights *= 1 + 0.1 * random.random(base)
            p[w, t] = weights / weights.sum()
            symbols[w, t] = random.choice(base, p=p[w, t])
    return symbols, p


def plain_laws(symbols, p, least=0.4):
    """Context -> its law, for those that are kept."""
    base = p.shape[2]
    laws, found = {}, {}
    for length in range(drafts.LONGEST + 1):
        sums: dict[tuple[int, ...], list[np.ndarray]] = {}
        for text, text_laws in zip(symbols.tolist(), p, strict=True):
            for t in range(length, len(text)):
                sums.setdefault(tuple(text[t - length : t]), []).append(text_laws[t])
        for context, seen in sums.items():
            before = np.full(base, 1 / base)
            for begin in range(1, length + 1):
                if context[begin:] in laws:
                    before = laws[context[begin:]]
                    break
            times = len(seen)
            q = (np.sum(seen, 0) + PRIOR * before) / (times + PRIOR)
            gain = times * (1 - np.minimum(q, before).sum())
            listed = times * q >= (LISTED * least if length else 0)
            if length and (gain < least or not listed.any()):
                continue
            rest = (1 - q[listed].sum()) / max(1 - before[listed].sum(), 1e-3)
            found[context] = np.where(listed, q, np.clip(rest, 1e-6, 1) * before)
        laws |= found
    return laws


def code_of(context, base=K):
    code = 1
    for token in context:
        code = code * base + token
    return code


def test_its_law_is_the_mean_of_the_laws_after_a_context():
    symbols, p = texts_and_laws()
    drafter = drafter_of(symbols, p, 10**6)
    laws = plain_laws(symbols, p)
    assert int(drafter.sizes[0]) == K
    assert sorted(map(code_of, laws)) == drafter.codes.tolist()
    assert drafter.length == max(map(len, laws)) > 2
    for context, law in laws.items():
        row = drafter.row([4, 3, 4, 3, *context]) if len(context) == drafter.length else None
        row = drafter.row_of[code_of(context)] if row is None else row
        # levels are rounded, and a token that is not listed adds those of some contexts
        off = np.abs(drafter.log_q[row] - np.log(law)).max()
        assert off < (len(context) + 1) / (2 * STEPS) + 1e-4, context
    np.testing.assert_allclose(np.exp(drafter.log_q).sum(1), 1, atol=0.1)


def test_a_text_is_read_by_its_longest_context():
    symbols, p = texts_and_laws()
    drafter = drafter_of(symbols, p, 10**6)
    rows = drafter.row_of
    for text in ([], [3], [0, 1, 2, 3, 4] * 3, *symbols[:, :9].tolist()):
        suffixes = [text[begin:] for begin in range(len(text) + 1)]
        found = next(rows[code_of(s)] for s in suffixes if code_of(s) in rows)
        assert drafter.row(text) == found


def test_every_length_is_found_by_its_codes():
    """The code of a context of zeros alone is a power of the base: no logarithm may round it."""
    for base in (2, 3, 5, 27, 256):
        for length in range(6):
            codes = torch.tensor([base**k for k in range(length + 1)])
            byte = torch.ones(base + length, dtype=torch.uint8)
            sizes = torch.tensor([base] + [1] * length, dtype=torch.int16)
            tokens = torch.cat((torch.arange(base), torch.zeros(length))).to(torch.uint8)
            drafter = Drafter(codes, sizes, byte[: length + 1], tokens, byte)
            assert drafter.length == length
            assert np.isfinite(drafter.log_q).all()
            assert drafter.row([0] * 9) == length


@pytest.mark.parametrize("most_bytes", [100, 400, 1500])
def test_it_keeps_to_its_size(most_bytes):
    symbols, p = texts_and_laws()
    drafter = drafter_of(symbols, p, most_bytes)
    assert sum(getattr(drafter, one.name).nbytes for one in fields(drafter)) <= most_bytes
    assert int(drafter.sizes[0]) == K
    assert np.isfinite(drafter.log_q).all()


def test_guesses_are_the_largest_sums():
    symbols, p = texts_and_laws()
    drafter = drafter_of(symbols, p, 10**6)
    random = np.random.default_rng(1)
    past, numbers = symbols[:2, :9], random.gumbel(size=(2, 6, K)).astype(np.float32)
    log_q = drafter.log_q
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafts, "DOUBT", 0.0)
        found = Guesser(drafter).guess(past, numbers)
        cold = Guesser(drafter, temperature=0.5, top_p=0.6).guess(past, numbers)
    assert found.shape == cold.shape == (2, 6)
    for row in range(2):
        text, cold_text = past[row].tolist(), past[row].tolist()
        for place in range(6):
            text.append(int((log_q[drafter.row(text)] + numbers[row, place]).argmax()))
            scores = log_q[drafter.row(cold_text)] / 0.5
            scores[scores < scores.max() + np.log(0.4)] = -np.inf
            cold_text.append(int((scores + numbers[row, place]).argmax()))
        assert text[9:] == found[row].tolist()
        assert cold_text[9:] == cold[row].tolist()


def test_guesses_end_where_they_are_in_doubt():
    drafter = drafter_of(*texts_and_laws(), 10**6)
    past, clear = np.zeros((1, 3), dtype=np.int64), np.eye(K)[2] * 30
    # of equal scores half the guesses are wrong, and two in a row are right too seldom for a third
    for temperature in (1e9, 1e300):
        equal = Guesser(drafter, temperature=temperature)
        assert equal.guess(past, np.zeros((1, 6, K))).shape == (1, 2)
    guesser = Guesser(drafter)
    assert guesser.guess(past, np.stack([clear] * 4)[None]).tolist() == [[2] * 4]
    # so many rows share a call that no guess pays
    assert guesser.guess(np.repeat(past, 100, 0), np.ones((100, 4, K))).shape == (100, 0)


@pytest.mark.parametrize("name", ["ar", "mixd"])
def test_it_is_made_from_the_laws_of_a_model(name):
    fields_ = {"vocab_size": 27, "context": 16}
    model = tiny_ar(**fields_) if name == "ar" else tiny_flow(couplings=("mixd",), **fields_)
    text = np.random.default_rng(0).integers(0, 27, 400).astype(np.uint8)
    with torch.no_grad():
        drafter = make_drafter(partial(laws, model), text, 16, 10**6)
    assert drafter is not None
    starts = np.linspace(0, 400 - 16, 400 // 16).astype(int)
    windows = torch.from_numpy(np.stack([text[s : s + 16] for s in starts]).astype(np.int64))
    with torch.no_grad():
        mean = laws(model, windows)[1].softmax(-1)
    mean = mean.flatten(0, 1).mean(0)
    close = 0.06 if name == "ar" else 0.3  # the noise of the latents is not the same
    np.testing.assert_allclose(drafter.log_q[0], mean.log().numpy(), atol=close)


@pytest.mark.parametrize(("tokens", "most"), [(16 * 15 + 5, 10**6), (4000, 100)])
def test_there_is_none_from_a_short_text(tokens, most):
    def refused(windows):
        raise AssertionError("nothing should be computed")

    assert make_drafter(refused, np.zeros(tokens, dtype=np.int64), 16, most) is None


@pytest.mark.parametrize(
    "model",
    [
        tiny_ar(vocab_size=257),
        tiny_ar(vocab_size=1),
        tiny_ar(patch=2, in_patch="autoregressive"),
        tiny_flow(couplings=("mixd", "mix1")),
        tiny_flow(couplings=("affine",)),
    ],
    ids=["many symbols", "one symbol", "patches", "noise inverted", "no weights"],
)
def test_there_is_none_for_models_that_gain_nothing(model):
    with torch.no_grad():
        assert make_drafter(partial(laws, model), np.zeros(999, dtype=np.int64), 8, 10**6) is None


# the file


@pytest.fixture
def run_folder(tmp_path):
    """A run directory of a tiny letter model with a drafter, though of another text."""
    with seeded(1):
        folder = save_run(tmp_path / "run", tiny_ar(vocab_size=27, context=16).eval())
    symbols, p = texts_and_laws(base=27)
    write_drafter(folder / DRAFT, drafter_of(symbols, p, 10**5))
    return folder


def same(a, b):
    return all(torch.equal(getattr(a, one.name), getattr(b, one.name)) for one in fields(Drafter))


def test_files_keep_it(run_folder, tmp_path):
    symbols, p = texts_and_laws(base=27)
    expected = drafter_of(symbols, p, 10**5)
    checkpoint = load_checkpoint(run_folder)
    assert same(checkpoint.model.drafter, expected)
    again = load_checkpoint(export(checkpoint, tmp_path / "out"))
    assert same(again.model.drafter, expected)
    # it is no part of the weights
    assert not [name for name in checkpoint.model.state_dict() if "draft" in name]
    assert not list(tmp_path.glob("**/*.tmp"))


def damaged_by(change):
    def write(path):
        tensors, _ = read_weights(path)
        change(tensors)
        write_weights(path, tensors, {})

    return write


DAMAGES = {
    "flipped": flip,
    "no tensors": lambda path: path.write_bytes(b"{}"),
    "weights": lambda path: path.write_bytes((path.parent / WEIGHTS).read_bytes()),
    "missing": damaged_by(lambda t: t.pop("rest")),
    "short": damaged_by(lambda t: t.update(tokens=t["tokens"][:-1])),
    "other symbols": damaged_by(lambda t: t.update(tokens=t["tokens"] + 100)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(run_folder, damage):
    DAMAGES[damage](run_folder / DRAFT)
    with pytest.raises(UserError) as caught:
        load_checkpoint(run_folder)
    assert str(run_folder / DRAFT) in str(caught.value)
    assert "remove" in str(caught.value)
    (run_folder / DRAFT).unlink()
    assert load_checkpoint(run_folder).model.drafter is None


def test_one_of_another_number_of_symbols_is_not_used(run_folder):
    write_drafter(run_folder / DRAFT, drafter_of(*texts_and_laws(), 10**5))
    assert load_checkpoint(run_folder).model.drafter is None


@pytest.mark.parametrize("adjusted", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=str)
def test_a_run_without_it_writes_the_same_text(run_folder, adjusted):
    def text(model, **more):
        generator = torch.Generator().manual_seed(3)
        options = {"num_tokens": 40, "num": 3} | adjusted | more
        return generate(model, generator=generator, **options).tokens

    model = load_checkpoint(run_folder).model
    with_drafter, steps = text(model), text(model, decoder="steps")
    model.drafter = None
    assert torch.equal(text(model), with_drafter)
    assert torch.equal(steps, with_drafter)


# training


@pytest.mark.slow
def test_training_makes_one_where_it_has_seen_enough(tmp_path, corpus_file, monkeypatch):
    trunk = TransformerConfig(width=8, num_heads=2, mlp_ratio=2)
    run = RunConfig(
        name="tiny",
        model=BaselineConfig(context=8, trunk=trunk, layers=1),
        data=DataConfig(source=str(corpus_file), tokenizer=TokenizerConfig()),
        train=TrainConfig(
            mode="joint",
            stage_steps=(4,),
            batch_size=4,
            log_every=1,
            precision="float32",
            evaluate_every=2,
            evaluate_windows=2,
            test_windows=2,
        ),
    )
    train(run, tmp_path / "none", device=torch.device("cpu"))
    assert not (tmp_path / "none" / DRAFT).exists()
    with monkeypatch.context() as patch:
        patch.setattr(drafts, "LEAST", 2)
        train(run, tmp_path / "some", device=torch.device("cpu"))
    model = load_checkpoint(tmp_path / "some").model
    assert model.drafter is not None
    assert int(model.drafter.sizes[0]) == model.config.vocab_size
    # the run ends again, and makes none: the old one goes
    (tmp_path / "some" / SUMMARY).unlink()
    train(run, tmp_path / "some", device=torch.device("cpu"))
    assert not (tmp_path / "some" / DRAFT).exists()
