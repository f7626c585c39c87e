"""Whole reports: the files, the numbers on the page, and missing pieces."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import tarflowlm
from helpers import metrics_of
from tarflowlm import chunks
from tarflowlm.config import TokenizerConfig
from tarflowlm.errors import UserError
from tarflowlm.runs.checkpoint import export, load_checkpoint, read_run
from tarflowlm.training.train import train
from tarflowlm_apps.report import report
from tarflowlm_apps.report.report import write_report


class Checker(HTMLParser):
    """Every tag is closed in order, no id is used twice, nothing is loaded; collects the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.ids, self.text, self.tags = [], [], "", []
        self.feed(page)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))
        assert "script" not in self.tags
        assert not re.search(r"url\((?!#)|@import", page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        assert all(
            value.startswith(("#", "data:"))
            for name, value in attrs
            if name in ("src", "href", "xlink:href")
        )

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(path) -> Checker:
    return Checker(Path(path).read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch):
    """Figures without content, for tests of the text around them."""

    def render(draw, name, folder, **settings):
        (folder / f"{name}.png").write_bytes(b"")
        return "<svg ></svg>"

    monkeypatch.setattr(report, "render", render)


@pytest.mark.slow
def test_report_has_figures_and_numbers(runs, tmp_path):
    out = tmp_path / "new" / "folder"
    result = write_report(list(runs.values()), out)
    flows = ("progressive", "joint")
    names = {"bits", *(f"{what}-{flow}" for what in ("blocks", "codebook") for flow in flows)}
    assert {path.name for path in out.iterdir()} == {f"{name}.png" for name in names} | {
        "index.html"
    }
    assert {Path(path).stem for path in result["figures"]} == names
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    assert [run["notes"] for run in result["runs"]] == [[], [], []]
    page = parsed(out / "index.html")
    assert page.tags.count("svg") == len(names)
    assert names <= set(page.ids)
    for name, directory in runs.items():
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        sign = "=" if name == "baseline" else "<="
        assert f"{sign} {summary['test']['bpc']:.4f} ({summary['test']['bound']})" in page.text
        assert f"{summary['parameters']:,}" in page.text
    for part in (
        "optim.codebook_lr_scale",
        "model.blocks.1.components",
        "exact, and it has no blocks",
    ):
        assert part in page.text
    assert page.text.count("3 samples of at most 16 tokens") == 3
    assert page.text.count("after block 1: ") == 2
    # the terms of the bound are those that training evaluated last
    shown = [float(number) for number in re.findall(r"3 of 3 blocks<= (\d+\.\d+)", page.text)]
    expected = []
    for name in ("progressive", "joint"):
        lines = metrics_of(runs[name])
        expected.append([line["nats_per_token"] for line in lines if line["split"] == "valid"][-1])
    assert shown == pytest.approx(expected, abs=2e-5)


def test_blocks_without_time_are_named(runs, tmp_path, undrawn):
    """A run of so many minutes writes the steps of its stages into its configuration."""
    copy = shutil.copytree(runs["progressive"], tmp_path / "short")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["train"]["stage_steps"] = [6, 4, 0]
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    text = parsed(write_report([copy])["page"]).text
    assert "Not trained, as the run had no time left: block 3." in text
    assert re.search(r"<= \d\.\d{4}, \d\.\d{4}, not trained \(no time\)", text)
    whole = parsed(write_report([runs["progressive"]], tmp_path / "out")["page"]).text
    assert "ot trained" not in whole


def test_one_test_window_has_no_standard_error(runs, tmp_path, undrawn):
    copy = shutil.copytree(runs["joint"], tmp_path / "short")
    summary = json.loads((copy / "summary.json").read_text(encoding="utf-8"))
    summary["test"] |= {"stderr": None, "windows": 1}
    (copy / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    nats = f"<= {summary['test']['nats_per_token']:.4f}"
    assert f"{nats} ±" in parsed(write_report([runs["joint"]], tmp_path / "out")["page"]).text
    text = parsed(write_report([copy])["page"]).text
    assert nats in text
    assert f"{nats} ±" not in text


def test_report_in_its_run_is_replaced(runs, tmp_path, undrawn):
    directory = shutil.copytree(runs["joint"], tmp_path / '<b>"x" & y')
    page = Path(write_report([directory])["page"])
    assert page == directory / "report" / "index.html"
    (directory / "summary.json").unlink()
    write_report([directory])
    text = parsed(page).text
    assert "stopped, step" in text
    assert '<b>"x" & y' in text
    assert (page.parent / "codebook-_b_x_y.png").exists()


def test_an_interrupted_report_is_written_again(runs, tmp_path, undrawn, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(report, "page_html", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_report([runs["joint"]], tmp_path / "out")
    assert parsed(Path(write_report([runs["joint"]], tmp_path / "out")["page"])).text


def test_missing_pieces_are_noted(runs, tmp_path, undrawn):
    young = shutil.copytree(
        runs["progressive"], tmp_path / "young", ignore=shutil.ignore_patterns("summary.json")
    )
    (young / "model.safetensors").unlink()
    first = next(line for line in metrics_of(young) if line["split"] == "train")
    (young / "metrics.jsonl").write_text(json.dumps(first), encoding="utf-8")
    model = export(load_checkpoint(runs["joint"]), tmp_path / "model")
    result = write_report([young, model], tmp_path / "out")
    assert {Path(path).stem for path in result["figures"]} == {"bits", "codebook-model"}
    (of_young,), (of_model,) = (run["notes"] for run in result["runs"])
    assert of_young.startswith("Neither samples nor blocks nor codebook are shown")
    assert "corpus cannot be used" in of_model
    assert result["runs"][1]["status"] == "finished"
    assert of_young in parsed(result["page"]).text


def test_text_that_changed_since_training_is_noted(runs, tmp_path, corpus_file, undrawn):
    copy = shutil.copytree(runs["joint"], tmp_path / "copy")
    text = tmp_path / "changed.txt"
    text.write_text(corpus_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    source = json.dumps(str(corpus_file))
    config = (copy / "config.json").read_text(encoding="utf-8")
    (copy / "config.json").write_text(config.replace(source, json.dumps(str(text))))
    (found,) = write_report([copy])["runs"]
    assert "has changed since training" in found["notes"][0]
    assert (copy / "report" / "blocks-copy.png").exists()


def test_a_text_that_is_too_short_now_is_noted(runs, tmp_path, corpus_file, undrawn):
    copy = shutil.copytree(runs["joint"], tmp_path / "copy")
    text = tmp_path / "short.txt"
    text.write_text("the king of the land had a daughter", encoding="utf-8")
    config = (copy / "config.json").read_text(encoding="utf-8")
    source = json.dumps(str(corpus_file))
    (copy / "config.json").write_text(config.replace(source, json.dumps(str(text))))
    summary = json.loads((copy / "summary.json").read_text(encoding="utf-8"))
    del summary["parameters"]
    (copy / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (found,) = write_report([copy])["runs"]
    assert "corpus cannot be used" in found["notes"][0]


@pytest.mark.slow
def test_report_of_a_tuned_model_reads_the_text_with_its_tokenizer(
    runs, tmp_path, corpus_file, undrawn
):
    run = read_run(runs["joint"])
    tokens = TokenizerConfig(kind="bpe", vocab_size=60)
    run = replace(
        run,
        data=replace(run.data, tokenizer=tokens),
        model=replace(run.model, vocab_size=0),
    )
    train(run, tmp_path / "parent", device=torch.device("cpu"))
    other = tmp_path / "other.txt"
    other.write_text("verily the lord said unto them begat " * 90, encoding="utf-8")
    tarflowlm.load(tmp_path / "parent").tune(other, tmp_path / "tuned", steps=1)
    (found,) = write_report([tmp_path / "tuned"])["runs"]
    assert found["notes"] == []
    assert (tmp_path / "tuned" / "report" / "blocks-tuned.png").exists()


def test_samples_are_the_model_s(runs, tmp_path, undrawn, monkeypatch):
    # in batches of two
    monkeypatch.setattr(chunks, "WRITTEN_TOKENS", 32)
    text = parsed(write_report([runs["joint"], runs["baseline"]], tmp_path / "out")["page"]).text
    for name in ("joint", "baseline"):
        assert all(one in text for one in tarflowlm.load(runs[name]).write(num=3, length=16))


def test_bad_arguments_write_nothing(runs, tmp_path):
    joint, out = runs["joint"], tmp_path / "out"
    wrong = [
        ([tmp_path / "none"], out),
        (list(runs.values()), None),
        ([Path("english-mini")], None),
    ]
    wrong += [([joint, joint], out), ([joint], joint), ([joint], joint / "config.json")]
    for directories, place in wrong:
        with pytest.raises(UserError):
            write_report(directories, place)
    assert not out.exists()
