"""Whole reports: the files, the numbers on the page, and what happens where pieces are missing."""

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tarflowlm.cli.main import main
from tarflowlm.errors import UserError
from tarflowlm.report import build, samples, write_report
from tarflowlm.report.page import summary_table
from tarflowlm.report.records import read_record
from tarflowlm.runs.checkpoint import export, seal


@pytest.fixture(autouse=True)
def denormals():
    """The command line's mode must not reach other tests."""
    yield
    torch.set_flush_denormal(False)


VOID = {"meta", "link", "br", "img"}


class Checker(HTMLParser):
    """Every tag is closed in order, no id is used twice, nothing is loaded; collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.ids, self.text, self.tags = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:")), value

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def undrawn(monkeypatch):
    """Figures without content, for tests of what stands around them."""

    def render(draw, path, *, width, height):
        path.write_bytes(b"")
        return "<svg ></svg>"

    monkeypatch.setattr(build, "render", render)
    monkeypatch.setattr(build, "render_narrow", lambda draw, name, *, height: "<svg ></svg>")


def parsed(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert "script" not in checker.tags
    assert not re.search(r"url\((?!#)|@import", path.read_text(encoding="utf-8"))
    return checker


def summary(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def together(runs, tmp_path_factory):
    """A report on all three runs."""
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    return out, write_report(list(runs.values()), out)


def test_the_files_are_there(together):
    out, result = together
    names = {"bits.png", "optimisation.png", "throughput.png", "blocks-progressive.png", "blocks-joint.png"}
    names |= {f"codebook-{name}.png" for name in ("progressive", "joint", "baseline")}
    assert {path.name for path in out.iterdir()} == names | {"index.html"}
    assert {Path(path).name for path in result["figures"]} == names
    for name in names:
        data = (out / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        assert 1000 < width < 2500
        assert 400 < height < 1500
    assert [run["notes"] for run in result["runs"]] == [[], [], []]


def test_the_page_holds_figures_and_numbers(together, runs):
    out, _ = together
    page = parsed(out / "index.html")
    assert page.tags.count("svg") == 2 * 8
    assert {"bits", "throughput", "blocks-joint", "codebook-baseline"} <= set(page.ids)
    for name, directory in runs.items():
        test = summary(directory)["test"]
        sign = "=" if name == "baseline" else "<="
        assert f"{sign} {test['bpc']:.4f} ({test['bound']})" in page.text
        assert f"{summary(directory)['parameters']:,}" in page.text
    assert "optim.codebook_lr_scale" in page.text
    assert "model.blocks.1.components" in page.text
    assert "exact, and it has no blocks" in page.text
    assert page.text.count("3 samples of 16 tokens") == 3
    # of the two flows alone
    assert page.text.count("after block 1: ") == 2


def test_the_bound_of_the_blocks_is_the_last_validation_bound(together, runs):
    """Computed anew from the weights, with the noise of the training run's evaluation."""
    page = parsed(together[0] / "index.html")
    for name in ("progressive", "joint"):
        lines = [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        nats = [line["nats_per_token"] for line in lines if line["split"] == "valid"][-1]
        shown = [float(number) for number in re.findall(r"bound of the model<= (\d+\.\d+)", page.text)]
        assert any(number == pytest.approx(nats, abs=2e-5) for number in shown), (shown, nats)


def test_a_report_in_its_run_is_replaced(runs, tmp_path, undrawn):
    directory = shutil.copytree(runs["joint"], tmp_path / "joint")
    before = {path.name for path in directory.iterdir()}
    first = write_report([directory])
    assert first["page"] == str(directory / "report" / "index.html")
    page = (directory / "report" / "index.html").read_bytes()
    (directory / "summary.json").unlink()
    write_report([directory])
    assert "in training, or stopped" in parsed(directory / "report" / "index.html").text
    assert (directory / "report" / "index.html").read_bytes() != page
    assert {path.name for path in directory.iterdir()} == before - {"summary.json"} | {"report"}


def test_a_run_of_which_little_is_left(runs, tmp_path):
    """In its first stage, no weights, no corpus: curves are drawn, the rest is told."""
    directory = shutil.copytree(
        runs["progressive"], tmp_path / "young", ignore=shutil.ignore_patterns("summary.json")
    )
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (directory / "metrics.jsonl").write_text(lines[0], encoding="utf-8")
    (directory / "model.safetensors").unlink()
    result = write_report([directory])
    assert len(result["figures"]) == 3
    assert "Neither samples nor blocks nor codebook" in result["runs"][0]["notes"][0]
    assert "holds no trained weights yet" in result["runs"][0]["notes"][0]
    assert "holds no trained weights yet" in parsed(Path(result["page"])).text


def test_without_the_corpus_blocks_are_left_out_and_codes_stay(runs, tmp_path, undrawn):
    directory = shutil.copytree(runs["progressive"], tmp_path / "moved")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["data"]["source"] = "/nowhere/words.txt"
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    seal(directory)
    result = write_report([directory])
    assert {Path(path).stem for path in result["figures"]} >= {"codebook-moved", "bits"}
    assert "blocks-moved" not in {Path(path).stem for path in result["figures"]}
    assert "the run's corpus cannot be used: '/nowhere/words.txt' is no file" in result["runs"][0]["notes"][0]


def test_a_model_without_its_log_has_no_curves(runs, tmp_path, undrawn):
    model = export(runs["joint"], tmp_path / "model")
    result = write_report([model])
    assert {Path(path).stem for path in result["figures"]} == {"codebook-model"}
    assert result["runs"][0]["status"] == "a model without its training log"
    together = write_report([model, runs["joint"]], tmp_path / "out")
    assert {"bits", "blocks-joint"} <= {Path(path).stem for path in together["figures"]}
    parsed(Path(together["page"]))


def test_released_models_are_known_by_name(tmp_path, undrawn, monkeypatch):
    monkeypatch.setattr(samples, "LENGTH", 4)
    result = write_report([Path("english-mini-ar")], tmp_path / "out")
    text = parsed(Path(result["page"])).text
    assert "english-mini-ar" in text
    assert "3 samples of 4 tokens" in text
    # no row without a value
    assert "tokens per second" not in text


def test_one_test_window_has_no_error(runs):
    record = read_record(runs["baseline"])
    test = record.summary["test"]
    single = replace(record, summary=record.summary | {"test": test | {"stderr": math.nan}})
    rows = {row[0]: row[1] for row in summary_table([single]).rows}
    assert rows["test, nats per token, standard error"] == f"= {test['nats_per_token']:.4f}"


def test_names_are_escaped(runs, tmp_path, undrawn):
    directory = shutil.copytree(runs["baseline"], tmp_path / '<b>"x" & y')
    result = write_report([directory], tmp_path / "out")
    text = parsed(Path(result["page"])).text
    assert '<b>"x" & y' in text
    assert (tmp_path / "out" / "codebook-_b_x_y.png").exists()


@pytest.fixture
def refused(capsys):
    def call(*argv: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["report", *map(str, argv)])
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
        return err

    return call


def test_bad_input_costs_one_line_and_writes_nothing(runs, tmp_path, refused):
    joint, out = runs["joint"], tmp_path / "out"
    assert "is not a directory" in refused(tmp_path / "none", "--out", out)
    assert "config.json is missing" in refused(tmp_path, "--out", out)
    assert "name it with --out" in refused(*runs.values())
    assert "the same name 'joint'" in refused(joint, joint, "--out", out)
    empty = shutil.copytree(joint, tmp_path / "empty")
    (empty / "metrics.jsonl").write_text("", encoding="utf-8")
    assert "has no metrics yet" in refused(empty, "--out", out)
    assert "holds no report" in refused(joint, "--out", empty)
    assert "is a file" in refused(joint, "--out", empty / "config.json")
    assert "add --out english-mini-report" in refused("english-mini")
    assert not out.exists()


def test_the_command_prints_what_it_wrote(runs, tmp_path, capsys, undrawn):
    main(["report", str(runs["joint"]), "--out", str(tmp_path / "a"), "--json", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Path(result["page"]).is_file()
    assert all(Path(path).is_file() for path in result["figures"])
    main(["report", str(runs["joint"]), "--out", str(tmp_path / "a"), "--device", "cpu"])
    assert "5 in PNG" in capsys.readouterr().out


def test_nothing_to_report_on():
    with pytest.raises(UserError, match="needs a run directory"):
        write_report([])
