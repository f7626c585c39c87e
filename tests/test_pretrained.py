"""The object that `load` returns, and the version."""

from dataclasses import replace
from functools import partial
from importlib import metadata

import pytest
import torch

import tarflowlm
from helpers import TEXT8, tiny_ar, tiny_flow
from tarflowlm.data import ByteTokenizer, load_tokenizer
from tarflowlm.errors import UserError
from tarflowlm.generation.texts import Samples
from tarflowlm.requests import Writing
from tarflowlm.runs.hub import FOLDER
from tarflowlm_apps.studio.catalogue import Catalogue


@pytest.fixture(scope="module", params=["english-mini", "english-mini-ar"])
def loaded(request) -> tarflowlm.Pretrained:
    return tarflowlm.load(request.param)


def test_unpacks_to_model_and_tokenizer(loaded):
    model, tokenizer = loaded
    assert model is loaded.model
    assert tokenizer is loaded.tokenizer
    assert loaded.config is model.config
    assert "parameters" in repr(loaded)
    assert ".write(prompt)" in repr(loaded)


def test_write(loaded):
    text = loaded.write("The King", length=12, seed=3)
    assert len(text) == 12
    assert text.startswith("the king")
    assert text == loaded.write("the king", length=12, seed=3)
    several = loaded.write("the king", length=12, seed=3, num=2, temperature=0.7)
    assert len(several) == 2
    assert len(set(several)) == 2
    prompt = loaded.encode("the king")
    generator = torch.Generator().manual_seed(3)
    how = {"temperature": loaded.run.temperature, "generator": generator}
    same = tarflowlm.generate(loaded, num_tokens=12, prompt=prompt, **how)
    assert loaded.decode(same.tokens[0]) == text


def test_the_usual_top_p_is_of_texts_without_blanks_at_the_usual_temperature(loaded):
    lm = replace(loaded, run=replace(loaded.run, temperature=0.9, top_p=0.5))
    write = partial(lm.write, length=24, num=2, seed=3)
    assert write() == write(temperature=0.9, top_p=0.5)
    assert write(top_p=0.8) == write(temperature=0.9, top_p=0.8)
    assert write(temperature=0.9) == loaded.write(
        length=24, num=2, seed=3, temperature=0.9, top_p=1.0
    )
    assert write() != write(temperature=0.9)
    filled = {"template": "the [...] of"}
    assert lm.write(**filled) == lm.write(**filled, temperature=0.9)


def test_every_call_refuses_weights_that_are_not_finite(tmp_path):
    lm = tarflowlm.Pretrained(tiny_flow(vocab_size=27, context=16).float(), TEXT8)
    torch.nn.init.constant_(lm.model.prior.block(0).transformer.layers[0].down.weight, torch.nan)
    calls = [
        lambda: lm.write("the", length=8),
        lambda: lm.fill("the _ of"),
        lambda: list(lm.stream("the", length=8)),
        lambda: lm.edit("the king"),
        lambda: lm.score("the king"),
        lambda: lm.evaluate("the king\n"),
        lambda: lm.save_pretrained(tmp_path / "own"),
    ]
    for call in calls:
        with pytest.raises(UserError, match="is not finite; the run diverged"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_list_of_templates_gives_the_texts_of_each(loaded):
    templates = ["The ___ of", "a_c"]
    texts = loaded.fill(templates, particles=2, seed=3)
    assert texts[0] == loaded.fill(templates[0], particles=2, seed=3)
    assert [len(text) for text in texts] == [10, 3]
    assert len(loaded.fill(templates, particles=2, num=2)) == 4
    assert loaded.fill([]) == []


@pytest.mark.parametrize("template", ["The ___ of ___", "The [...4] of"])
def test_every_template_of_a_list_has_numbers_of_its_own(template):
    lm = tarflowlm.load("english-mini-ar")
    texts = lm.fill([template] * 3, particles=2, seed=3)
    assert len(set(texts)) == 3
    # as samples of one template have
    assert texts == lm.fill(template, particles=2, seed=3, num=3)


def test_write_fills_blanks(loaded):
    for options in (
        {"template": "The ___ of", "particles": 2},
        {"template": "The XXX of", "blank": "X"},
    ):
        text = loaded.fill(**options)
        assert (text[:4], text[7:], len(text)) == ("the ", " of", 10)


@pytest.mark.slow
def test_fill_edit_and_stream(loaded):
    options = {"length": 24, "seed": 3}
    whole, pieces = loaded.write("The king", **options), list(loaded.stream("The king", **options))
    assert "".join(pieces) == whole
    assert "".join(loaded.stream("The king", stop=whole[12:14], **options)) == whole[:12]
    assert next(loaded.stream("The king", **options)) == pieces[0]
    if loaded.model.is_exact:
        return
    text = "the king of the land"
    assert loaded.edit(text, strength=0.0) == text
    first, second = loaded.edit(text, rewrite="king", num=2, candidates=8)
    assert first.startswith("the ")
    assert second.endswith(" of the land")
    assert loaded.edit(text, replace=("king", "lord")).startswith("the lord")
    assert loaded.edit(text, level=0, strength=0.0) == text


def test_a_loaded_model_that_is_trained_further_is_saved_as_one_of_its_own(tmp_path):
    lm = tarflowlm.load("english-mini-ar")
    same = lm.save_pretrained(tmp_path / "same")
    assert (same / "summary.json").exists()
    torch.nn.init.zeros_(next(lm.model.parameters()))
    changed = lm.save_pretrained(tmp_path / "changed")
    assert not (changed / "summary.json").exists()
    assert "1.6480" in (same / "README.md").read_text(encoding="utf-8")
    card = (changed / "README.md").read_text(encoding="utf-8")
    assert "not recorded" in card
    assert "1.6480" not in card
    assert "step" in tarflowlm.load(same).info
    assert "step" not in tarflowlm.load(changed).info


def test_scores_show_themselves_in_a_notebook(loaded):
    scores = loaded.score("The King", samples=2)
    html = scores._repr_html_()
    assert html.count("<span") == len(scores.bits) == 8
    assert ("<=" in html) != scores.exact


@pytest.mark.parametrize(
    ("build", "tokenizer"),
    [(tiny_flow, TEXT8), (tiny_ar, TEXT8), (tiny_flow, ByteTokenizer())],
    ids=["flow", "baseline", "bytes"],
)
def test_a_model_of_one_s_own_loop_is_used_everywhere(run_json, tmp_path, build, tokenizer):
    model = build(vocab_size=tokenizer.vocab_size, context=16).float().train()
    lm = tarflowlm.Pretrained(model, tokenizer)
    assert model.training
    assert lm.to("cpu").device == torch.device("cpu")
    text = lm.write("the ", length=12, seed=1, temperature=1.0)
    folder = lm.save_pretrained(tmp_path / "own")
    with pytest.raises(UserError, match="overwrite=True"):
        lm.save_pretrained(folder)
    assert lm.save_pretrained(folder, overwrite=True) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    again = tarflowlm.load(folder)
    assert again.write("the ", length=12, seed=1) == text
    argv = ["sample", folder, "--prompt", "the ", "--length", 12, "--seed", 1]
    assert run_json(*argv)["samples"][0]["text"] == text
    assert run_json("score", folder, "--text", text)["bits"] == lm.score(text).total
    assert run_json("info", folder)["preset"] == "own"
    (tmp_path / "valid.txt").write_text("the king of the land\n" * 5)
    found = lm.evaluate(tmp_path / "valid.txt", samples=2, seed=1)
    argv = ["eval", folder, "--data", tmp_path / "valid.txt", "--samples", 2, "--seed", 1]
    measured = run_json(*argv)
    assert {name: measured[name] for name in found.to_json()} == found.to_json() | {
        # JSON has no NaN
        name: None
        for name, value in found.to_json().items()
        if value != value
    }
    opened = Catalogue((str(folder),), "cpu")
    assert opened.load(opened.models[0]).tokenizer.kind == tokenizer.kind


@pytest.mark.parametrize("options", [{}, {"num": 2}, {"stop": "e"}])
def test_a_list_of_prompts_gives_the_texts_of_each(loaded, options):
    prompts = ["The king", "a ", "Once upon a time"]
    how = {"length": 18, "seed": 2} | options
    texts = loaded.write(prompts, **how)
    assert len(texts) == 3 * options.get("num", 1)
    assert texts[: len(texts) // 3] == as_list(loaded.write(prompts[0], **how))


def as_list(found: str | list[str]) -> list[str]:
    return [found] if isinstance(found, str) else found


def test_a_list_of_texts_is_scored_as_one_by_one(loaded):
    texts = ["The King", "a", "once upon a time there was a king", "The King"]
    for one, text in zip(loaded.score(texts, samples=2, seed=3), texts, strict=True):
        alone = loaded.score(text, samples=2, seed=3)
        assert one.bits.tolist() == pytest.approx(alone.bits.tolist(), rel=1e-4, abs=1e-4)
        assert (one.text, one.notice) == (alone.text, alone.notice)
    assert [len(tokens) for tokens in loaded.encode(texts)] == [8, 1, 33, 8]


@pytest.mark.slow
def test_training_in_a_line_returns_the_model(tmp_path, corpus_file):
    small = {"model.context": 16, "model.trunk.width": 8, "model.layers": 1, "train.batch_size": 2}
    out, options = (
        tmp_path / "run",
        {"data": corpus_file, "steps": 3, "train.test_windows": 4} | small,
    )
    lm = tarflowlm.train("mini-ar", out, **options)
    assert (lm.config.layers, lm.run.train.num_steps) == (1, 3)
    again, resumed = tarflowlm.train("mini-ar", str(out), **options), tarflowlm.resume(out)
    assert lm.write("a", length=8) == again.write("a", length=8) == resumed.write("a", length=8)
    tuned = lm.tune(corpus_file, tmp_path / "tuned", steps=2)
    assert tuned.run.parent.startswith("run@")


@pytest.mark.slow
def test_spaces_belong_to_the_token_after_them():
    """One before a blank, or at the end of a prompt, is that of the token to be drawn."""
    small = tarflowlm.load("stories")
    apart, joined = (small.fill(text) for text in ("The _ of the _ tree", "The_ of the_ tree"))
    assert apart == joined
    assert small.write("The king", length=6, seed=7).startswith("The king,")
    assert small.write("The king ", length=6, seed=7).startswith("The king ")
    assert small.write(" ", length=2).startswith(" ")


@pytest.mark.parametrize("build", [tiny_flow, tiny_ar])
def test_a_typed_space_is_kept_and_a_longer_text_begins_alike(build):
    """Also where only one token in many begins a word, and in every way to write a text."""
    tokenizer = load_tokenizer(FOLDER / "english-small")
    flow = {"couplings": ("mixd",), "latent_dim": 8, "log_std": -6.0} if build is tiny_flow else {}
    model = build(vocab_size=tokenizer.vocab_size, context=16, **flow).float()
    lm = tarflowlm.Pretrained(model, tokenizer)
    start = "the old cat "
    for options in ({}, {"top_k": 1}, {"decoder": "steps"}, {"top_p": 0.1}):
        how = {"seed": 1, "stop_at_end": False} | options
        texts = lm.write(start, num=9, max_new_tokens=3, **how)
        assert [text[: len(start)] for text in texts] == [start] * 9
        longer = lm.write(start, num=9, max_new_tokens=6, **how)
        assert [a.startswith(b) for a, b in zip(longer, texts, strict=True)] == [True] * 9
        assert "".join(lm.stream(start, max_new_tokens=3, **how)) == texts[0]
        mixed = lm.write(["the old cat", start, f"a story of {start}"], max_new_tokens=3, **how)
        assert mixed[1].startswith(start)
        assert mixed[2].startswith(f"a story of {start}")
    for options in ({"without": "z"}, {"contains": "king"}, {"particles": 2}):
        text = lm.write(start, length=12, seed=1, **options)
        assert text.startswith(start)
    both = lm.write(["the cat", "the cat and "], contains="cat", length=8, num=5, seed=3)
    assert all(text.startswith("the cat and ") for text in both[5:])
    assert lm.write(start, stop=" ", max_new_tokens=3).startswith(start)
    # the evidence counts it, and a stop does not take that away
    weighed, plain = (
        next(Samples(Writing(prompt=text, particles=4, length=12, stop=" "), lm).batches())
        for text in (start, start.rstrip())
    )
    found = [one.generation.evidence.log_evidence.item() for one in (weighed, plain)]
    assert found[0] < found[1] - 0.3
    # beyond a window
    assert lm.write(start * 4, length=24, seed=1).startswith(start * 4)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({"couplings": ("mixd",), "latent_dim": 8}, {"decoder": "sweeps"}),
        ({"couplings": ("mixd", "affine"), "latent_dim": 8}, {}),
        ({"couplings": ("mix1",), "latent_dim": 8}, {"particles": 3}),
        ({"couplings": ("mixd",), "latent_dim": 8, "patch": 2}, {}),
        ({"couplings": ("mixd", "affine"), "latent_dim": 8}, {"contains": "king"}),
        ({"couplings": ("mixd",), "latent_dim": 8}, {"decoder": "sweeps", "without": "z"}),
    ],
)
def test_a_typed_space_that_no_drawn_token_can_take_is_a_token_of_the_prompt(model, options):
    tokenizer = load_tokenizer(FOLDER / "english-small")
    flow = tiny_flow(vocab_size=tokenizer.vocab_size, context=16, log_std=-6.0, **model).float()
    lm = tarflowlm.Pretrained(flow, tokenizer)
    texts = lm.write("the old cat ", num=9, length=12, seed=1, **options)
    assert [text.startswith("the old cat ") for text in texts] == [True] * 9
    if {"contains", "without"} & set(options):  # a weighed token takes it
        assert not any(text.startswith("the old cat  ") for text in texts)


def test_score(loaded):
    tokens = loaded.encode("The king")
    assert loaded.decode(tokens) == "the king"
    found = loaded.score("The king", samples=2, seed=1)
    assert torch.equal(found.bits, tarflowlm.score(loaded.model, tokens, samples=2, seed=1).bits)


def test_texts_are_read_as_the_training_text_was(loaded):
    assert loaded.decode(loaded.encode("The 7 Kings")) == "the seven kings"
    for call in (loaded.write, loaded.score, loaded.encode):
        with pytest.raises(UserError, match="nothing is left"):
            call("日本")


def test_products_of_an_evaluation_may_be_in_bfloat16(loaded):
    text = "There was once a king, and he had a daughter.\n" * 20
    exact, narrow = (loaded.evaluate(text, precision=p) for p in ("float32", "bfloat16"))
    assert exact == loaded.evaluate(text)
    assert 0 < abs(narrow.nats_per_token - exact.nats_per_token) < 0.01
    with pytest.raises(UserError, match="precision 'float16'"):
        loaded.evaluate(text, precision="float16")


def test_a_text_itself_is_evaluated_as_its_file_is(tmp_path):
    model = tiny_ar(vocab_size=257, context=16).float()
    lm = tarflowlm.Pretrained(model, ByteTokenizer(has_end=True))
    text = "Once there was a king.\r\nHe had a daughter.\n"
    (tmp_path / "valid.txt").write_text(text, newline="")
    of_file = lm.evaluate(str(tmp_path / "valid.txt"))
    assert of_file == lm.evaluate(text) == lm.evaluate([text])
    documents = lm.evaluate(["Once there was a king.", "He had a daughter."])
    assert (documents.tokens, documents.characters) == (32, 31)
    wrong = {"no.txt": "'no.txt'", "one line " * 50: "neither", "a\0": "neither", 3: "3"}
    for data, said in (*wrong.items(), ([], "0 texts"), (["\udc80"], "UTF-8")):
        with pytest.raises(UserError, match=said):
            lm.evaluate(data)
    with pytest.raises(UserError, match="split test"):
        lm.evaluate([text], split="test")


def test_a_corpus_may_be_read_with_another_normalisation():
    model = tiny_ar(vocab_size=257, context=16).float()
    lm = tarflowlm.Pretrained(model, ByteTokenizer(has_end=True))
    plain, letters = (
        lm.evaluate("tales", split="valid", windows=2, normalize=how) for how in (None, "text8")
    )
    assert plain.tokens == letters.tokens == 32
    assert plain.nats_per_token != letters.nats_per_token


def test_a_text_of_less_than_a_patch_is_refused():
    model = tiny_flow(vocab_size=256, context=16, patch=2).float()
    lm = tarflowlm.Pretrained(model, ByteTokenizer())
    with pytest.raises(UserError, match=r"1 token, fewer than a patch of 2: use a longer text$"):
        lm.evaluate(["a"])


def test_a_stack_whose_last_block_starts_can_be_one_s_own():
    model = tiny_flow(vocab_size=27, couplings=("mix1", "mix1"), starts="last").float()
    assert tarflowlm.Pretrained(model, TEXT8).run.train.mode == "joint"


def test_version(run):
    assert tarflowlm.__version__ == metadata.version("tarflowlm")
    assert run("--version").out == f"tarflowlm {tarflowlm.__version__}\n"


@pytest.mark.slow
def test_own_text_in_other_letters_is_kept(tmp_path):
    (tmp_path / "de.txt").write_text("Die Müller über Straßen. " * 400, encoding="utf-8")
    small = {
        "model.context": 16,
        "model.trunk.width": 8,
        "model.layers": 1,
        "train.test_windows": 4,
    }
    for _ in range(2):  # the same call goes on with the run
        lm = tarflowlm.train(
            "mini-ar", tmp_path / "run", data=tmp_path / "de.txt", steps=2, **small
        )
    assert lm.tokenizer.kind == "char"
    assert lm.write("Die Mü", length=12).startswith("Die Mü")
