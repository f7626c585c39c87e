"""`tarflowlm sample`: batches, streams, stops, prompts and samples in files, interrupts."""

import io
import json
import re
import signal

import pytest

from helpers import save_run, tiny_flow
from tarflowlm import chunks
from tarflowlm.data import TEXT8_ALPHABET, CharTokenizer
from tarflowlm.generation import texts as samples

MODELS = ("ar", "patches")
STEPS = ("--decoder", "steps")


@pytest.fixture
def texts(run_json):
    """texts(*argv): the texts of the samples."""
    return lambda *argv: [sample["text"] for sample in run_json("sample", *argv)["samples"]]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(chunks, "WRITTEN_TOKENS", 32)


def stdin(monkeypatch, text: str | bytes) -> None:
    content = text.encode() if isinstance(text, str) else text
    stream = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", stream)


@pytest.mark.parametrize("name", MODELS)
def test_samples_repeat_and_keep_to_length_and_prompt(run_json, models, name):
    argv = ["sample", models[name], "--num", 2, "--length", 8, "--prompt", "ab c", *STEPS]
    first, second, other = (run_json(*argv, "--seed", seed) for seed in (3, 3, 4))
    assert first.keys() == {"samples", "seconds", "interrupted"}
    assert first["samples"] == second["samples"] != other["samples"]
    for sample in first["samples"]:
        assert len(sample["text"]) == 8
        assert sample["text"].startswith("ab c")
        assert set(sample["text"]) <= set(TEXT8_ALPHABET)
        assert sample["prompt"] == "ab c"


def test_passes_go_from_noise_to_text(run_json, run, model):
    sample = run_json("sample", model, "--length", 8, "--passes")["samples"][0]
    assert len(sample["passes"]) == 3
    assert sample["passes"][-1] == sample["text"]
    shown = run("sample", model, "--length", 8, "--passes").out
    assert all(label in shown for label in ("noise", "after block 2", "after block 1"))


def test_texts_with_passes_end_with_their_document(run_json, tmp_path):
    tokenizer = CharTokenizer("abc ", "none", has_end=True)
    model = save_run(tmp_path / "ends", tiny_flow(vocab_size=5, context=32), tokenizer=tokenizer)
    argv = ["sample", model, "--prompt", "a b", "--length", 30, "--num", 4]
    plain, passes = (run_json(*argv, *more)["samples"] for more in ([], ["--passes"]))
    assert any(one["ended"] for one in plain)
    for one, other in zip(plain, passes, strict=True):
        assert (one["text"], one["ended"]) == (other["text"], other["ended"])
        assert other["passes"][-1] == other["text"]
    (whole,) = run_json(*argv[:-1], 1, "--passes", "--no-stop")["samples"]
    assert not whole["ended"]
    assert len(whole["text"]) >= 30


def test_passes_of_a_prompt_beyond_the_context_are_refused(refused, model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n" + "ab " * 8 + "\n", encoding="utf-8")
    argv = ["sample", model, "--prompts", prompts, "--passes", "--max-new-tokens", 8]
    refused(*argv, names=["--passes", "context"])


def test_templates_are_filled_in_and_candidates_counted(run, run_json, model):
    argv = ["sample", model, "--template"]
    sample = run_json(*argv, "The ___ of, 9")["samples"][0]
    assert (sample["template"], len(sample["text"])) == ("The ___ of, 9", 15)
    assert (sample["text"][:4], sample["text"][7:]) == ("the ", " of nine")
    assert run_json(*argv, "a X", "--blank", "X")["samples"][0]["text"][:2] == "a "
    prompt = run_json("sample", model, "--prompt", "at ", "--length", 5)["samples"][0]
    assert prompt["prompt"] == "at "
    done = run(*argv, "the ___", "--particles", 4)
    assert "candidates of 4" in done.err


def test_gaps_have_any_length_and_the_likely_ones_are_told(run, run_json, models):
    for name in ("ar", "one"):
        argv = ["sample", models[name], "--template", "A [...3] b [...2] 9", "--particles", 4]
        for sample in run_json(*argv, "--num", 2)["samples"]:
            assert re.fullmatch(r"a .{1,3} b .{1,2} nine", sample["text"])
            assert [len(lengths) for lengths in sample["lengths"]] == [3, 2]
            assert all(sum(lengths) == pytest.approx(1) for lengths in sample["lengths"])
        assert "gap 2: " in run(*argv).err


def test_constraints_are_kept(texts, models):
    for name in ("ar", "one"):
        argv = [models[name], "--num", 2, "--length", 12, "--prompt", "ae", "--particles", 4]
        letters = [word for letter in "Eqxz" for word in ("--without", letter)]
        for text in texts(*argv, *letters):
            assert not set(text[2:]) & set("eqxz")
        for text in texts(*argv, "--contains", "Ab"):
            assert " ab" in text
            assert len(text) == 12
        for text in texts(*argv, "--contains", "Ab", "--contains", "cd"):
            assert re.search(r" ab\b", text)
            assert re.search(r" cd\b", text)
            assert len(text) == 12
        for text in texts(*argv, "--without", "Ab", "--contains", "b"):
            assert not re.search(r"\bab\b", text)
        # a line end is in no text
        assert texts(*argv, "--stop", "\n") == texts(*argv)
        # a word at the end of the prompt may not go on
        argv[-3] = "at ab"
        for text in texts(*argv, "--contains", "ab"):
            assert re.match(r"at ab\b", text)


@pytest.mark.parametrize("name", MODELS)
def test_a_text_has_a_given_number_of_words(run, texts, models, name):
    argv = [models[name], "--prompt", "ab c", "--words", 5, "--num", 2]
    found = texts(*argv, *STEPS)
    assert [len(text.split()) for text in found] == [5, 5]
    assert not any(text[-1:].isspace() for text in found)
    assert run("sample", *argv[:-2], *STEPS, "--stream").out == f"{found[0]}\n"


def test_a_constraint_counts_within_the_words(texts, models):
    for name in ("ar", "one"):
        argv = [models[name], "--length", 15, "--words", 3, "--contains", "b", "--num", 2]
        for text in texts(*argv):
            assert len(text.split()) == 3
            assert "b" in text.split()


def test_what_may_be_meant_otherwise_is_told(run, models):
    argv = ["sample", models["ar"], "--length", 8]
    assert "'ab' as whole words" in run(*argv, "--without", "ab").err
    assert "--template" in run(*argv, "--prompt", "a […] b", "--length", 12).err
    assert "--template" not in run(*argv, "--prompt", "a b").err


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "more", [[], ["--prompt", "ab"], ["--length", "20"]], ids=["free", "prompt", "windows"]
)
def test_texts_do_not_depend_on_the_batches(texts, run, models, name, more, request):
    argv = [models[name], "--num", 4, *STEPS, *more]
    together = texts(*argv)
    request.getfixturevalue("small_batches")
    out = run("sample", *argv).out
    assert out.split("\n\n") == [*together[:-1], f"{together[-1]}\n"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("more", [[], ["--prompt", "ab"], ["--length", "24", "--stop", "e"]])
def test_streams_show_the_text(texts, run, models, name, more):
    argv = [models[name], *STEPS, *more]
    (text,) = texts(*argv)
    assert run("sample", *argv, "--stream").out == f"{text}\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_sample_ends_before_a_stop_that_follows_the_prompt(texts, models, name):
    argv = [models[name], "--num", 3, "--length", 24, "--prompt", "stop here ", *STEPS]
    whole = texts(*argv)
    stops = [whole[0][18:20], whole[1][14]]
    for text, cut in zip(whole, texts(*argv, "--stop", stops[0], "--stop", stops[1]), strict=True):
        found = [at for stop in stops if (at := text.find(stop, 10)) >= 0]
        assert cut == text[: min(found, default=None)]


@pytest.mark.slow
def test_prompts_come_from_a_file_or_standard_input(
    run_json, texts, models, tmp_path, monkeypatch, small_batches
):
    lines = "abc\r\n\nThe\n  \nzz top\n"
    (tmp_path / "prompts.txt").write_text(lines, encoding="utf-8", newline="")
    for name in MODELS:
        argv = ["sample", models[name], "--num", 2, "--length", 10, *STEPS, "--prompts"]
        found = run_json(*argv, tmp_path / "prompts.txt")["samples"]
        assert [s["prompt"] for s in found] == ["abc", "abc", "the", "the", "zz top", "zz top"]
        assert all(s["text"].startswith(s["prompt"]) and len(s["text"]) == 10 for s in found)
        assert len({s["text"] for s in found}) == 6
        assert [s["text"] for s in found[:2]] == texts(*argv[1:-1], "--prompt", "abc")
        stdin(monkeypatch, lines)
        assert run_json(*argv, "-")["samples"] == found


@pytest.mark.slow
def test_samples_go_to_a_new_file(run, run_json, refused, texts, model, tmp_path, small_batches):
    out, other = tmp_path / "samples.jsonl", tmp_path / "other.jsonl"
    argv = ["sample", model, "--num", 5, "--prompt", "ab ", "--seed", 4, "--length", 8, *STEPS]
    assert "5 samples" in run(*argv, "--out", out).out
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == texts(*argv[1:])
    assert [(line["index"], line["seed"], line["prompt"]) for line in lines] == [
        (i, 4, "ab ") for i in range(5)
    ]
    refused(*argv, "--out", out, names=[str(out), "exists"])
    # an error that only the sampler finds leaves no empty file
    refused(*argv, "--stop", "日本", "--out", other, names=["日本"])
    assert not other.exists()
    assert run_json(*argv, "--out", other)["written"] == 5
    assert other.read_bytes() == out.read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible", "small_batches")
@pytest.mark.parametrize(
    "name", [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
)
def test_an_interrupt_keeps_the_finished_samples(run, model, tmp_path, monkeypatch, name):
    calls: list[int] = []
    writer = samples.Writer

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(getattr(signal, name))
        return writer(*args, **options)

    monkeypatch.setattr(samples, "Writer", interrupted)
    argv, out = ["sample", model, "--num", 9, *STEPS], tmp_path / "out.jsonl"
    done = run(*argv, "--out", out)
    assert done.status == 130
    assert done.err == f"tarflowlm: interrupted; 4 of 9 samples are finished and kept in {out}\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert len(out.read_text(encoding="utf-8").splitlines()) == 4
    calls.clear()
    done = run(*argv, "--json")
    assert (done.status, done.err) == (130, "tarflowlm: interrupted; 4 of 9 samples are finished\n")
    result = json.loads(done.out)
    assert (len(result["samples"]), result["interrupted"]) == (4, True)
