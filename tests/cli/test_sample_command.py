"""Daily use of `tarflowlm sample`: batches, streams, stops, prompts from files, samples to a file."""

import io
import json
import signal

import pytest
from tarflowlm.cli.prompts import Wording

from tarflowlm.cli import sample
from tarflowlm.data import TokenizerConfig, build_tokenizer
from tarflowlm.terminal.streams import first_stop

FEW = ("mini-ar", "mini-mixd", "mini-mixd-p2")


@pytest.fixture
def texts(run_json):
    """texts(*argv): the texts of the samples."""
    return lambda *argv: [sample["text"] for sample in run_json("sample", *argv)["samples"]]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(sample, "BATCH_TOKENS", 64)


def stdin(monkeypatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("more", [[], ["--prompt", "ab"], ["--length", "40"]], ids=["free", "prompt", "windows"])
def test_texts_do_not_depend_on_the_batches(texts, run, models, name, more, request):
    argv = [models[name], "--num", 5, *more]
    together = texts(*argv)
    request.getfixturevalue("small_batches")
    assert texts(*argv) == together
    out = run("sample", *argv).out
    assert [f"sample {i}" in out for i in range(1, 7)] == [True] * 5 + [False]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("more", [[], ["--prompt", "ab"], ["--length", "70", "--stop", "e"]])
def test_what_is_streamed_is_the_text(texts, run, models, name, more):
    argv = [models[name], "--decoder", "steps", *more]
    (text,) = texts(*argv)
    assert run("sample", *argv, "--stream").out == f"{text}\n"


def test_several_streams_are_numbered(texts, run, model):
    first, second = texts(model, "--num", 2)
    assert run("sample", model, "--num", 2, "--stream").out == f"sample 1\n{first}\n\nsample 2\n{second}\n"


@pytest.mark.parametrize("name", FEW)
def test_a_sample_ends_before_a_stop_that_follows_the_prompt(texts, models, name):
    argv = [models[name], "--num", 3, "--length", 70, "--prompt", "stop here "]
    whole = texts(*argv)
    stops = [whole[0][30:32], whole[1][20]]
    for text, cut in zip(whole, texts(*argv, "--stop", stops[0], "--stop", stops[1]), strict=True):
        assert cut == text[: first_stop(text, stops, 10)]
        assert not any(stop in cut[10:] for stop in stops)


def test_no_window_follows_when_all_rows_have_stopped(run_json, model):
    argv = ["sample", model, "--length", 90, "--decoder", "steps"]
    text = run_json(*argv)["samples"][0]["text"]
    done = run_json(*argv, "--stop", text[0])
    assert done["samples"][0]["text"] == ""
    assert done["sweeps"] == [32, 32, 32]


def test_a_stop_is_normalised_as_a_prompt_is():
    tokenizer = build_tokenizer(TokenizerConfig())
    assert Wording(tokenizer, "text8").stop("The, ") == "the"
    assert Wording(tokenizer, None).stop("The ") == "the "
    # nothing would be left of it
    assert Wording(tokenizer, "text8").stop(" ") == " "


def test_prompts_come_from_a_file_or_standard_input(run_json, texts, models, tmp_path, monkeypatch, small_batches):
    lines = "abc\r\n\nThe\n  \nzz top\n"
    (tmp_path / "prompts.txt").write_text(lines, encoding="utf-8", newline="")
    for name in FEW:
        argv = ["sample", models[name], "--num", 2, "--length", 20, "--prompts"]
        found = run_json(*argv, tmp_path / "prompts.txt")["samples"]
        assert [s["prompt"] for s in found] == ["abc", "abc", "the", "the", "zz top", "zz top"]
        assert all(s["text"].startswith(s["prompt"]) and len(s["text"]) == 20 for s in found)
        assert len({s["text"] for s in found}) == 6
        assert [s["text"] for s in found[:2]] == texts(*argv[1:-1], "--prompt", "abc")
        stdin(monkeypatch, lines)
        assert run_json(*argv, "-")["samples"] == found


def test_prompts_that_fill_a_window_are_continued(run_json, model, monkeypatch):
    long = "a b " * 10
    stdin(monkeypatch, f"{long}\nabc\n")
    found = run_json("sample", model, "--length", 60, "--prompts", "-")["samples"]
    assert [s["text"][:3] for s in found] == ["a b", "abc"]
    assert {len(s["text"]) for s in found} == {60}


def test_wrong_prompts_are_named_by_their_line(refused, model, tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_text("abc\n\nd!\n", encoding="utf-8")
    out = tmp_path / "out.jsonl"
    refused("sample", model, "--prompts", path, "--out", out, names=[f"line 3 of {path}", "'!'"])
    path.write_text("Abc\n" + 40 * "a" + "\n", encoding="utf-8")
    refused("sample", model, "--prompts", path, "--out", out, names=[f"line 2 of {path}", "40 tokens", "--length"])
    path.write_text("\n\n", encoding="utf-8")
    refused("sample", model, "--prompts", path, names=["no prompt"])
    refused("sample", model, "--prompts", tmp_path / "missing", names=["missing"])
    stdin(monkeypatch, "")
    refused("sample", model, "--prompts", "-", names=["no prompt"])
    assert not out.exists()


def test_samples_go_to_a_new_file(run, run_json, refused, texts, model, tmp_path, small_batches):
    out = tmp_path / "samples.jsonl"
    argv = ["sample", model, "--num", 5, "--prompt", "ab ", "--seed", 4]
    assert "5 samples" in run(*argv, "--out", out).out
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == texts(*argv[1:])
    assert [(line["index"], line["seed"], line["prompt"]) for line in lines] == [(i, 4, "ab ") for i in range(5)]
    assert all(line["log_evidence"] < 0 for line in lines)
    before = out.read_bytes()
    refused(*argv, "--out", out, names=[str(out), "exists", "choose another"])
    assert out.read_bytes() == before
    refused(*argv, "--out", tmp_path / "nowhere" / "x", names=["nowhere", "folder"])
    # an error that only the sampler finds leaves no empty file
    other = tmp_path / "other.jsonl"
    refused(*argv, "--temperature", "0", "--out", other, names=["temperature 0.0"])
    assert not other.exists()
    assert run_json(*argv, "--out", other)["written"] == 5
    assert other.read_bytes() == before


@pytest.mark.usefixtures("interruptible", "small_batches")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_finished_is_kept(run, model, tmp_path, monkeypatch, number):
    calls: list[int] = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
        return generate(*args, **options)

    generate = sample.generate
    monkeypatch.setattr(sample, "generate", interrupted)
    argv, out = ["sample", model, "--num", 9], tmp_path / "out.jsonl"
    done = run(*argv, "--out", out)
    assert (done.status, done.err) == (
        130,
        f"tarflowlm: interrupted; 4 of 9 samples are finished and kept in {out}\n",
    )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert len(out.read_text(encoding="utf-8").splitlines()) == 4
    calls.clear()
    done = run(*argv, "--json")
    assert (done.status, done.err) == (130, "tarflowlm: interrupted; 4 of 9 samples are finished\n")
    result = json.loads(done.out)
    assert (len(result["samples"]), result["interrupted"]) == (4, True)
    calls.clear()
    done = run(*argv)
    assert done.status == 130
    assert "sample 4" in done.out


def test_a_model_of_lower_case_gets_lower_case(run, run_json, refused, model):
    argv = ["sample", model, "--length", "12"]
    for given in (["--prompt", "The Cat"], ["--template", "The ___ of"], ["--template", "The XX of", "--blank", "X"]):
        done = run(*argv, *given, "--json")
        assert (done.status, done.err.count("\n")) == (0, 1)
        assert "lower case" in done.err
        assert json.loads(done.out)["samples"][0]["text"].startswith("the ")
    assert run(*argv, "--prompt", "the").err == ""
    refused(*argv, "--prompt", "The!", names=["'!'", "--normalize text8"])


def test_templates_are_normalised_and_keep_their_blanks(run_json, refused, model):
    argv = ["sample", model, "--normalize", "text8", "--template"]
    assert len(run_json(*argv, "The ___ of")["samples"][0]["text"]) == 11
    text = run_json(*argv, "___, No. 9 __!")["samples"][0]["text"]
    assert text[3:12] == " no nine "
    assert len(text) == 14
    refused(*argv, "The end", names=["no blank", "'_'", "--prompt"])


def test_candidates_are_told_in_plain_words(run, model):
    argv = ["sample", model, "--prompt", "ab"]
    out = run(*argv, "--particles", 4).out
    assert "4 candidates, of which about" in out
    assert "log p(given) about" in out
    assert "log p" not in run(*argv).out


WRONG = {
    "passes": (["--passes"], ["--passes", "baseline"]),
    "states": (["--states", "--json"], ["--states", "baseline"]),
    "states-shown": (["--states"], ["--states", "--json"]),
    "stream-json": (["--stream", "--json"], ["--stream", "--json"]),
    "stream-particles": (["--stream", "--prompt", "a", "--particles", "2"], ["--stream", "--particles"]),
    "particles": (["--particles", "2"], ["--particles", "--prompt"]),
    "blank": (["--blank", "#"], ["--blank", "--template"]),
    "prompts": (["--prompt", "a", "--prompts", "-"], ["--prompt", "--prompts"]),
    "no-particles": (["--prompt", "a", "--particles", "0"], ["particles 0"]),
    "stream-length": (["--stream", "--num", "2", "--length", "0"], ["length 0"]),
    "stop": (["--stop", ""], ["--stop ''"]),
    "stop-unknown": (["--stop", "\n"], ["alphabet"]),
    "stop-template": (["--stop", "a", "--template", "a_"], ["--stop", "--template"]),
    "interactive": (["--interactive", "--num", "2"], ["--interactive", "--num"]),
}


@pytest.mark.parametrize(("wrong", "names"), WRONG.values(), ids=WRONG.keys())
def test_what_would_have_no_effect_is_refused(refused, models, wrong, names):
    refused("sample", models["mini-ar"], *wrong, names=names)
